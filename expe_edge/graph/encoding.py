"""How a positional encoding becomes nodes: the interface, which is also that of no encoding at all.

An emitter has the same places to act as the PyTorch encoding: embeddings, projection, rotation, score bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from expe_edge.graph.nodes import GraphBuilder
from expe_edge.graph.weights import Float, LayerWeights, ModelWeights
from expe_edge.model.config import ExPEConfig
from expe_edge.positions.encoding import EncodingParameters

#: Appends to a graph, or to a branch of it, what is added to the scores of the heads [begin, end) of a group:
#: (B or 1, end − begin, T, S) float32, or an empty name where nothing is.
Bias = Callable[[GraphBuilder, int, int], str]


class EmitLinear(Protocol):
    """Appends the nodes of linear `name` on tensor `hidden`: its product with `weight` (C_in, C_out), and `bias`."""

    def __call__(self, name: str, hidden: str, weight: Float, /, *, bias: Float | None = None) -> str:
        """Return the name of its output."""


@dataclass(frozen=True)
class Projection:
    """Names of the tensors that attention takes in one layer.

    query: (B, T, H·D); keys and values behind it, (B, T, (H + 2·Hkv)·D), where `key` and `value` are empty.
    key, value: (B, T, Hkv·D).
    biases: for each group of heads what is added to their scores; None where nothing is.
    positioned_values: whether values carry positions, and so the attention's output grows with them.
    """

    query: str
    key: str = ""
    value: str = ""
    biases: tuple[Bias | None, ...] = (None,)
    positioned_values: bool = False


def split(graph: GraphBuilder, config: ExPEConfig, name: str, fused: str) -> list[str]:
    """Split (B, T, (H + 2·Hkv)·D) into queries, keys and values."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return graph.multi("Split", [fused, graph.ints(queries, keys, keys)], 3, name=f"{name}.split", axis=-1)


def bias_of(scores: str, heads: int) -> Bias:
    """Return a bias of a tensor that there is, (B or 1, heads, T, S)."""
    return lambda graph, begin, end: heads_of(graph, scores, begin, end, heads)


def heads_of(graph: GraphBuilder, tensor: str, begin: int, end: int, heads: int) -> str:
    """Append what leaves [begin, end) of the second axis, which is `heads` long."""
    if (begin, end) == (0, heads):
        return tensor
    return graph.op("Slice", tensor, *(graph.ints(number) for number in (begin, end, 1)), name=f"{tensor}.heads")


def by_head(graph: GraphBuilder, hidden: str, weight: str, name: str) -> str:
    """Append `weight` (n, C) times `hidden` (B, T, C): n numbers of each token, (B, n, T) float32.

    onnxruntime makes one node of it.
    """
    turned = graph.op("Transpose", graph.widen(hidden, name), name=f"{name}.tokens", perm=[0, 2, 1])
    return graph.op("MatMul", weight, turned, name=f"{name}.weight")


@dataclass(frozen=True)
class Span:
    """A group of heads and the keys that they see.

    heads: the query heads [begin, end).
    distances: appends j − i of its keys, (B, 1, T, S) int64, exact; None where it sees all keys, at 0, 1, 2, ….
    """

    begin: int
    end: int
    distances: Callable[[], str] | None = None


@dataclass
class PositionNodes:
    """No encoding, and the base of the others. `begin` makes the tensors that all layers share."""

    graph: GraphBuilder
    weights: ModelWeights
    linear: EmitLinear
    #: The positions of the queries, (B, T) int64.
    positions: str = "position_ids"
    #: Whether the cache grows, so that padding may stand between a row's keys.
    growing_cache: bool = False
    #: The groups of heads; empty for one group, which sees all keys.
    spans: Sequence[Span] = ()
    #: How many keys attention is given, (1,) int64; empty for as many as the mask has.
    columns: str = ""
    #: Shared tensors by what they are.
    shared: dict[str, str] = field(default_factory=dict)
    parameters: EncodingParameters = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = self.config.encoding_parameters
        self.spans = self.spans or (Span(0, self.config.num_attention_heads),)

    @property
    def config(self) -> ExPEConfig:
        """The model's config."""
        return self.weights.config

    @property
    def sizes(self) -> tuple[int, int]:
        """Widths of the queries and of the keys."""
        size = self.config.head_dim
        return self.config.num_attention_heads * size, self.config.num_key_value_heads * size

    def begin(self) -> None:
        """Append what is computed once for all layers."""

    def embed(self, hidden: str) -> str:
        """Append what acts on the embeddings (B, T, C)."""
        return hidden

    def project(self, layer: str, hidden: str, weights: LayerWeights) -> Projection:
        """Append the fused product of `hidden` (B, T, C) and what positions add to it."""
        fused = self.linear(f"{layer}.qkv", hidden, weights.qkv)
        return Projection(fused, biases=self.biases)

    @property
    def biases(self) -> tuple[Bias | None, ...]:
        """What is added to the scores of every group in all layers."""
        return (None,) * len(self.spans)

    def float_positions(self) -> str:
        """The queries' positions as (B, T, 1) float32; exact below 2^24."""
        positions = self.graph.op("Cast", self.positions, name="positions.float", to=1)
        return self.graph.op("Unsqueeze", positions, self.graph.ints(2), name="positions.column")

    def key_positions(self) -> str:
        """The positions of all keys, (S,) int64: 0, 1, 2, …; (B, 1, 1, S) in a growing cache, padding not counted."""
        if self.growing_cache:
            return self.counted_positions()
        zero, one = self.graph.scalar(0, np.int64), self.graph.scalar(1, np.int64)
        if self.columns:
            total = self.graph.op("Squeeze", self.columns, name="keys.total")
        else:
            shape = self.graph.op("Shape", "attention_mask", name="keys.shape")
            total = self.graph.op("Gather", shape, one, name="keys.total")
        return self.graph.op("Range", zero, total, one, name="keys.positions")

    def counted_positions(self) -> str:
        """How many tokens stand before every key, (B, 1, 1, S) int64, as the mask has it."""
        if "counted" not in self.shared:
            graph = self.graph
            tokens = graph.op("CumSum", "attention_mask", graph.scalar(1, np.int64), name="keys.tokens")
            before = graph.op("Sub", tokens, graph.scalar(1, np.int64), name="keys.before")
            self.shared["counted"] = graph.op("Unsqueeze", before, graph.ints(1, 2), name="keys.positions")
        return self.shared["counted"]

    def float_distances(self, span: Span) -> str:
        """j − i of the keys that a group sees, (B, 1, T, S) float32, once for all layers."""
        name = f"distances.{span.begin}"
        if name not in self.shared:
            distances = self.distances() if span.distances is None else span.distances()
            self.shared[name] = self.graph.op("Cast", distances, name="distances.float", to=1)
        return self.shared[name]

    def distances(self) -> str:
        """j − i for every query i and key j, (B, 1, T, S) int64, exact."""
        queries = self.graph.op("Unsqueeze", self.positions, self.graph.ints(1, 3), name="queries.positions")
        return self.graph.op("Sub", self.key_positions(), queries, name="distances")
