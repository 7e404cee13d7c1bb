"""The graph: one builder for every encoding, every format of the weights and either cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx

from expe_edge import __version__
from expe_edge.errors import ExportError
from expe_edge.graph.attention import GroupedAttention, PortableAttention
from expe_edge.graph.buffer import BufferedAttention, columns_of
from expe_edge.graph.encoding import PositionNodes, Span, by_head
from expe_edge.graph.encodings import POSITION_NODES
from expe_edge.graph.linears import Float32, LinearFormat
from expe_edge.graph.matrices import EMBEDDING_FORMATS, StoredMatrix
from expe_edge.graph.nodes import FLOAT, FLOAT16, GraphBuilder
from expe_edge.graph.norms import FusedNorms, StandardNorms
from expe_edge.graph.padding import AsGiven, TokensFirst
from expe_edge.graph.weights import LayerWeights, ModelWeights
from expe_edge.graph.windows import Keys, window_keys
from expe_edge.model.config import ExPEConfig
from expe_edge.package.contract import LOGITS_TO_KEEP, GraphContract
from expe_edge.quant.blocks import Float
from expe_edge.quant.channels import CacheScales

#: The name of the head among the linears.
HEAD = "head"


def graph_contract(
    config: ExPEConfig,
    *,
    int8_cache: bool = False,
    portable: bool = False,
    windows: Sequence[int] = (),
    gpu: str | None = None,
) -> GraphContract:
    """Return the contract of the graph of a model with `config`; arguments as of `build_graph`.

    Raises:
        ExportError: a model that is larger than a package may be.
    """
    try:
        return GraphContract(
            layers=config.num_hidden_layers,
            key_value_heads=config.num_key_value_heads,
            head_size=config.head_dim,
            vocab_size=config.vocab_size,
            cache_dtype="int8" if int8_cache else gpu or "float32",
            growing_cache=portable,
            windows=windows,
            whole_buffer=gpu is not None,
        )
    except ValueError as error:
        raise ExportError(f"no package holds this model: {error}") from error


class Linear(NamedTuple):
    """One product: the tensor that enters it, its weight (C_in, C_out), and whether its input is peaked."""

    input: str
    weight: Float
    peaked: bool


class BuiltGraph(NamedTuple):
    """The graph, and its linears by name in the order of the graph."""

    model: onnx.ModelProto
    linears: dict[str, Linear]


def build_graph(
    weights: ModelWeights,
    formats: LinearFormat[Any] | Mapping[str, LinearFormat[Any]],
    *,
    embedding: StoredMatrix | None = None,
    cache: Sequence[CacheScales] | None = None,
    portable: bool = False,
    windows: Sequence[int] = (),
    gpu: str | None = None,
) -> BuiltGraph:
    """Return the model as an ONNX graph with the tensors of `graph_contract`.

    Args:
        formats: of all linears, or of each by its name.
        embedding: the stored embedding; float32 by default. Of a tied one, the head's format decides.
        cache: scales of every layer, for an int8 cache.
        portable: standard operators alone, and so a cache that grows. The formats must be made for it too.
        windows: of every key/value head, how many tokens a query sees, 0 for all; empty where all see all.
        gpu: the type that a graph for GPUs computes in, float32 or float16; None for one for CPUs.

    Raises:
        ExportError: a head size that the attention operator does not take, slopes that only folded weights have, or
            positions that half precision would round.
    """
    if gpu == "float16":
        require_narrow(weights)
    if not portable and gpu is None and weights.config.needs_portable is not None:
        raise ExportError(weights.config.needs_portable)
    if not weights.folded and weights.config.needs_folding is not None:
        raise ExportError(weights.config.needs_folding)
    contract = graph_contract(weights.config, int8_cache=cache is not None, portable=portable, windows=windows, gpu=gpu)
    functions = not portable and gpu is None
    builder = GraphBuilder(element=FLOAT16 if gpu == "float16" else FLOAT, functions=functions)
    return _Decoder(builder, weights, formats, embedding, cache, contract).build()


def require_narrow(weights: ModelWeights) -> None:
    """Raise `ExportError` where half precision would round positions: where any but scores and keys have them."""
    if weights.config.positional not in ("expe", "exqpe"):
        return
    if not weights.folded or any(layer.positions is None or layer.positions.grows for layer in weights.layers):
        raise ExportError(
            "half precision would round the positions of this model, which enter more than its keys (`where: key`) or "
            "are left inline; use `precision` float32"
        )


def linears_of(weights: ModelWeights, *, portable: bool) -> dict[str, Linear]:
    """Return the linears of the float32 graph by name, in its order, without the memory that its weights take."""
    contract = graph_contract(weights.config, portable=portable)
    return _Decoder(GraphBuilder(weights=False), weights, Float32(), None, None, contract).build().linears


class _Decoder:
    def __init__(
        self,
        graph: GraphBuilder,
        weights: ModelWeights,
        formats: LinearFormat[Any] | Mapping[str, LinearFormat[Any]],
        embedding: StoredMatrix | None,
        cache: Sequence[CacheScales] | None,
        contract: GraphContract,
    ) -> None:
        self.weights, self.config, self.formats = weights, weights.config, formats
        self.graph, self.contract = graph, contract
        self.linears: dict[str, Linear] = {}
        self.run: AsGiven
        self.positions: PositionNodes
        self.attention: GroupedAttention | PortableAttention
        kind = POSITION_NODES[self.config.positional]
        if contract.growing_cache:
            self.run = AsGiven(graph)
            self.positions = kind(graph, weights, self.linear, self.run.positions, growing_cache=True)
            self.attention = PortableAttention(graph, self.config, self.positions.key_positions)
            self.norms = StandardNorms(graph, self.config)
        else:
            self.run = run = TokensFirst(graph)
            whole = contract.whole_buffer
            columns = columns_of(graph, contract) if whole else [""] * len(contract.groups)
            groups = list(zip(contract.window_lengths, columns, strict=True))
            keys = [
                window_keys(graph, run, name, end) if name else Keys("lengths", run.last, end or run.total)
                for name, end in groups
            ]
            spans, whole_text = self._spans(keys), next((end for name, end in groups if not name), "")
            self.positions = kind(graph, weights, self.linear, run.positions, spans=spans, columns=whole_text)
            attention = BufferedAttention if whole else GroupedAttention
            self.attention = attention(graph, self.config, contract, keys, run, cache)
            self.norms = FusedNorms(graph, self.config)
        self.tied = self._format(HEAD).store(HEAD, weights.head) if self.config.tie_word_embeddings else None
        self.embedding = self.tied or embedding or EMBEDDING_FORMATS["float32"](weights.embedding, None)

    def _spans(self, keys: Sequence[Keys]) -> list[Span]:
        """Return the query heads of every group, with the keys that they see."""
        shared = self.config.num_attention_heads // self.config.num_key_value_heads
        groups = zip(self.contract.groups, keys, strict=True)
        return [Span(group.begin * shared, group.end * shared, seen.distances) for group, seen in groups]

    def build(self) -> BuiltGraph:
        graph, layers = self.graph, self.weights.layers
        self.positions.begin()
        hidden = self.positions.embed(self.embedding.lookup(graph, self.run.token_ids))
        gains = [(f"layers.{index}.attention.norm", weights.attention_norm) for index, weights in enumerate(layers)]
        gains.append(("norm", self.weights.norm))
        normed = self.norms.norm(*gains[0], hidden)
        for index, weights in enumerate(layers):
            name = f"layers.{index}"
            written = self._attention(f"{name}.attention", index, normed, weights)
            norm = f"{name}.feed_forward.norm", weights.feed_forward_norm
            hidden, normed = self.norms.add(f"{name}.attention.residual", hidden, written, *norm)
            written = self._feed_forward(f"{name}.feed_forward", normed, weights)
            hidden, normed = self.norms.add(f"{name}.feed_forward.residual", hidden, written, *gains[index + 1])
        logits = self.linear(HEAD, self._kept(self.run.restore(normed)), self.weights.head, tied=self.tied)
        graph.emit("Identity", [graph.widen(logits, "logits")], ["logits"], name="logits")
        proto = graph.model(self.contract.inputs, self.contract.outputs, f"expe-edge {__version__}")
        return BuiltGraph(proto, self.linears)

    def _kept(self, hidden: str) -> str:
        """Append what leaves those of `hidden` (B, T, C) that logits are wanted of; all in a portable graph."""
        graph = self.graph
        if isinstance(self.attention, PortableAttention):
            return hidden
        begin = graph.op("Neg", graph.optional(LOGITS_TO_KEEP, 0), name="kept.begin")
        begin = graph.op("Unsqueeze", begin, graph.ints(0), name="kept.begin")
        return graph.op("Slice", hidden, begin, graph.ints(np.iinfo(np.int64).max), graph.ints(1), name="kept")

    def _format(self, name: str) -> LinearFormat[Any]:
        return self.formats if isinstance(self.formats, LinearFormat) else self.formats[name]

    def linear(
        self,
        name: str,
        hidden: str,
        weight: Float,
        *,
        bias: Float | None = None,
        peaked: bool = False,
        tied: StoredMatrix | None = None,
    ) -> str:
        """Append the product `name` in its format, and note what calibration needs to find."""
        if all(hidden != linear.input for linear in self.linears.values()):
            self.graph.describe(hidden, weight.shape[0])
        self.linears[name] = Linear(hidden, weight, peaked)
        linear_format = self._format(name)
        matrix = tied or linear_format.store(name, weight)
        return linear_format.emit(self.graph, name, hidden, matrix, bias=bias, peaked=peaked)

    def _attention(self, name: str, index: int, normed: str, weights: LayerWeights) -> str:
        projection = self.positions.project(name, normed, weights)
        mixed = self.attention.emit(f"{name}.mix", index, projection)
        if weights.gate is not None:
            mixed = self._gated(name, mixed, normed, weights.gate)
        return self.linear(f"{name}.out", mixed, weights.out, peaked=projection.positioned_values)

    def _gated(self, name: str, mixed: str, normed: str, columns: Float) -> str:
        """Multiply each head's result, of (B, T, H·D), by its gate: the sigmoid of `normed` times `columns` (C, H)."""
        graph, config = self.graph, self.config
        spread = np.repeat(np.eye(config.num_attention_heads, dtype=np.float32), config.head_dim, axis=1)
        if graph.element != FLOAT:
            spread = spread.astype(np.float16)
        weight = graph.weight(f"{name}.gate.weight", columns.T)
        inputs = [mixed, normed, weight, graph.constant(spread)]
        return graph.function("GatedHeads", inputs, _gated_heads, name=name, last="mix.gated")

    def _feed_forward(self, name: str, hidden: str, weights: LayerWeights) -> str:
        graph = self.graph
        wide = self.linear(f"{name}.up", hidden, weights.up)
        if self.config.hidden_act == "gelu":
            active = graph.op("Gelu", wide, name=f"{name}.gelu")
        else:
            active = graph.function("SwiGLU", [wide], _swiglu, name=name, last="active")
        return self.linear(f"{name}.down", active, weights.down, peaked=True)


def _gated_heads(graph: GraphBuilder, name: str, mixed: str, normed: str, weight: str, spread: str) -> str:
    """Append `mixed` (B, T, H·D) times gates, which a product with ones, `spread` (H, H·D), brings to their columns."""
    opened = graph.op("Sigmoid", by_head(graph, normed, weight, f"{name}.gate"), name=f"{name}.gate.opened")
    opened = graph.narrow(opened, f"{name}.gate")
    opened = graph.op("Transpose", opened, name=f"{name}.gate.tokens", perm=[0, 2, 1])
    opened = graph.op("MatMul", opened, spread, name=f"{name}.gate.spread")
    return graph.op("Mul", mixed, opened, name=f"{name}.mix.gated")


def _swiglu(graph: GraphBuilder, name: str, wide: str) -> str:
    """Append the second half of (B, T, 2·I) times the first one's SiLU (Shazeer, GLU Variants, 2020)."""
    gate, up = graph.multi("Split", [wide], 2, name=f"{name}.halves", axis=-1, num_outputs=2)
    silu = graph.op("Mul", gate, graph.op("Sigmoid", gate, name=f"{name}.sigmoid"), name=f"{name}.silu")
    return graph.op("Mul", silu, up, name=f"{name}.active")
