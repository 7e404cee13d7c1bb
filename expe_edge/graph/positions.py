"""How each positional encoding becomes nodes; the names are those of `model.encodings.POSITIONAL_ENCODINGS`.

An emitter has the same four places to act as the PyTorch encoding: embeddings, projection, rotation, score bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from expe_edge.graph.nodes import GraphBuilder
from expe_edge.graph.weights import Float, FoldedPositions, LayerWeights, ModelWeights
from expe_edge.model.config import ExPEConfig
from expe_edge.model.encodings import inverse_frequencies
from expe_edge.positions.codes import PositionCode
from expe_edge.positions.parameters import EncodingParameters, ExPEParameters, RotaryParameters, alibi_slopes

#: Appends a linear's nodes: its name, the tensor that enters it, its weight (C_in, C_out); returns its output.
EmitLinear = Callable[[str, str, Float], str]


@dataclass(frozen=True)
class Projection:
    """Tensor names: query (B, T, H·D), key and value (B, T, Hkv·D), bias (B or 1, H or 1, T, S) or empty.

    positioned_values: whether values carry positions, and so the attention's output grows with them.
    """

    query: str
    key: str
    value: str
    bias: str = ""
    positioned_values: bool = False


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
    #: Shared tensors by what they are.
    shared: dict[str, str] = field(default_factory=dict)
    parameters: EncodingParameters = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = self.config.encoding_parameters

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
        query, key, value = self.split(layer, self.linear(f"{layer}.qkv", hidden, weights.qkv))
        return Projection(query, key, value, self.shared.get("bias", ""))

    def split(self, layer: str, fused: str) -> list[str]:
        """Split (B, T, H·D + 2·Hkv·D) into queries, keys and values."""
        queries, keys = self.sizes
        sizes = self.graph.ints(queries, keys, keys)
        return self.graph.multi("Split", [fused, sizes], 3, name=f"{layer}.split", axis=-1)

    def float_positions(self) -> str:
        """The queries' positions as (B, T, 1) float32; exact below 2^24."""
        positions = self.graph.op("Cast", self.positions, name="positions.float", to=1)
        return self.graph.op("Unsqueeze", positions, self.graph.ints(2), name="positions.column")

    def key_positions(self) -> str:
        """The positions of all keys, (S,) int64: 0, 1, 2, …; (B, 1, 1, S) in a growing cache, padding not counted."""
        if self.growing_cache:
            return self.counted_positions()
        zero, one = self.graph.scalar(0, np.int64), self.graph.scalar(1, np.int64)
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

    def distances(self) -> str:
        """j − i for every query i and key j, (B, 1, T, S) int64, exact."""
        queries = self.graph.op("Unsqueeze", self.positions, self.graph.ints(1, 3), name="queries.positions")
        return self.graph.op("Sub", self.key_positions(), queries, name="distances")


class SinusoidalNodes(PositionNodes):
    """Sines and cosines, computed in the graph: no table, no longest length."""

    def embed(self, hidden: str) -> str:
        width = self.config.hidden_size
        frequencies = self.graph.constant(inverse_frequencies(width, 10000.0).numpy())
        angles = self.graph.op("Mul", self.float_positions(), frequencies, name="positions.angles")
        waves = [self.graph.op(kind, angles, name=f"positions.{kind.lower()}") for kind in ("Sin", "Cos")]
        both = self.graph.op("Concat", *waves, name="positions.waves", axis=-1)
        if width % 2:  # the last cosine has no place
            both = self.graph.op("Slice", both, *(self.graph.ints(n) for n in (0, width, 2)), name="positions.kept")
        return self.graph.op("Add", hidden, both, name="embedding.positioned")


class RotaryNodes(PositionNodes):
    """Rotary embedding from `position_ids`, in the halves convention."""

    parameters: RotaryParameters

    def begin(self) -> None:
        graph = self.graph
        frequencies = graph.constant(inverse_frequencies(self.config.head_dim, self.parameters.theta).numpy())
        angles = graph.op("Mul", self.float_positions(), frequencies, name="rotary.angles")  # (B, T, D/2)
        angles = graph.op("Unsqueeze", angles, graph.ints(2), name="rotary.angles")  # (B, T, 1, D/2)
        self.shared["cos"] = graph.op("Cos", angles, name="rotary.cos")
        self.shared["sin"] = graph.op("Sin", angles, name="rotary.sin")

    def project(self, layer: str, hidden: str, weights: LayerWeights) -> Projection:
        plain = super().project(layer, hidden, weights)
        query, key = self.rotate(f"{layer}.query", plain.query), self.rotate(f"{layer}.key", plain.key)
        return Projection(query, key, plain.value)

    def rotate(self, name: str, states: str) -> str:
        """Turn (B, T, heads·D) by the shared angles."""
        graph, size = self.graph, self.config.head_dim
        headed = graph.op("Reshape", states, graph.ints(0, 0, -1, size), name=f"{name}.heads")
        first, second = graph.multi("Split", [headed], 2, name=f"{name}.halves", axis=-1, num_outputs=2)
        cos, sin = self.shared["cos"], self.shared["sin"]
        left = graph.op("Sub", graph.op("Mul", first, cos), graph.op("Mul", second, sin))
        right = graph.op("Add", graph.op("Mul", second, cos), graph.op("Mul", first, sin))
        turned = graph.op("Concat", left, right, name=f"{name}.turned", axis=-1)
        return graph.op("Reshape", turned, graph.ints(0, 0, -1), name=f"{name}.rotated")


class RelativeNodes(PositionNodes):
    """T5's bias, its buckets unrolled into one row for each distance up to max_distance."""

    def begin(self) -> None:
        table = self.weights.relative_table
        assert table is not None
        graph = self.graph
        back = graph.op("Neg", self.distances(), name="relative.back")
        limits = graph.scalar(0, np.int64), graph.scalar(len(table) - 1, np.int64)
        back = graph.op("Clip", back, *limits, name="relative.clipped")
        back = graph.op("Squeeze", back, graph.ints(1), name="relative.rows")  # (B, T, S)
        bias = graph.op("Gather", graph.weight("relative.table", table), back, name="relative.gather")
        self.shared["bias"] = graph.op("Transpose", bias, name="relative.bias", perm=[0, 3, 1, 2])


class ALiBiNodes(PositionNodes):
    """A fixed slope for each head times the distance."""

    def begin(self) -> None:
        slopes = np.array(alibi_slopes(self.config.num_attention_heads), dtype=np.float32).reshape(1, -1, 1, 1)
        distance = self.graph.op("Cast", self.distances(), name="alibi.distance", to=1)
        self.shared["bias"] = self.graph.op("Mul", distance, self.graph.constant(slopes), name="alibi.bias")


class ExPENodes(PositionNodes):
    """ExPE and ExQPE. Positions are integer codes; they enter as p_n only where they cannot be, or are not, folded."""

    parameters: ExPEParameters

    def begin(self) -> None:
        distances_alone = self.weights.folded and self.parameters.relative and self.parameters.code.limbs == 1
        if not distances_alone:
            self.shared["codes"] = self.codes("queries", self.positions, self.parameters.code.stored)
        if self.parameters.temperature:
            self.shared["temperature"] = self.temperature()

    def temperature(self) -> str:
        """What queries that see n keys are multiplied by, (B, T, H·D): 1 + c·ln(n/N) in content heads, else 1."""
        graph, heads = self.graph, self.config.num_attention_heads
        strength = self.parameters.temperature * np.array(self.parameters.content(heads), dtype=np.float32)
        strengths = graph.constant(np.repeat(strength, self.config.head_dim))
        seen = graph.op("Add", self.float_positions(), graph.scalar(1.0), name="temperature.seen")
        growth = graph.op("Div", seen, graph.scalar(float(self.config.training_length)), name="temperature.lengths")
        growth = graph.op("Log", growth, name="temperature.growth")
        grown = graph.op("Mul", growth, strengths, name="temperature.grown")
        return graph.op("Add", grown, graph.scalar(1.0), name="temperature")

    def codes(self, name: str, positions: str, code: PositionCode) -> str:
        """Append the limbs of int64 `positions` (…) by integer arithmetic: (…, G) float32, every value exact."""
        graph = self.graph
        columns = graph.op("Unsqueeze", positions, graph.ints(-1), name=f"{name}.column")
        shifted = graph.op("Div", columns, graph.ints(*code.weights), name=f"{name}.shifted")
        if code.limbs > 1:
            modulus = graph.ints(*[1 << code.bits] * (code.limbs - 1), np.iinfo(np.int64).max)
            shifted = graph.op("Mod", shifted, modulus, name=f"{name}.codes")
        return graph.op("Cast", shifted, name=f"{name}.float", to=1)

    def vectors(self) -> str:
        """p_n = start + codes · limb scales, (B, T, l), bit for bit the float32 that PyTorch computes."""
        if "vectors" not in self.shared:
            parameters, code = self.parameters, self.parameters.code
            steps = np.array(parameters.limb_steps, dtype=np.float64)
            if code.limbs == 1:
                steps = np.array(code.stored.weights, dtype=np.float64)[:, None] * steps
            scales = self.graph.weight("positions.scales", steps.astype(np.float32))
            start = self.graph.weight("positions.start", np.array(parameters.starts, dtype=np.float32))
            grown = self.graph.op("MatMul", self.shared["codes"], scales, name="positions.grown")
            self.shared["vectors"] = self.graph.op("Add", grown, start, name="positions.vectors")
        return self.shared["vectors"]

    def start_vectors(self) -> str:
        """p_n without its steps, (B, T, l): what the queries' input gets where positions enter the keys' alone."""
        if "start_vectors" not in self.shared:
            shape = self.graph.op("Shape", self.vectors(), name="positions.shape")
            self.shared["start_vectors"] = self.graph.op("Expand", "positions.start", shape, name="positions.started")
        return self.shared["start_vectors"]

    def positioned(self, name: str, hidden: str, *, constant: bool = False) -> str:
        """Override the first l dimensions of `hidden` (B, T, C), or add to them. constant: by p_n without its steps."""
        graph, dims = self.graph, self.parameters.dims
        sizes = graph.ints(dims, self.config.hidden_size - dims)
        head, tail = graph.multi("Split", [hidden, sizes], 2, name=f"{name}.parts", axis=-1)
        vectors = self.start_vectors() if constant else self.vectors()
        if self.parameters.how == "add":
            vectors = graph.op("Add", head, vectors, name=f"{name}.added")
        return graph.op("Concat", vectors, tail, name=f"{name}.positioned", axis=-1)

    def embed(self, hidden: str) -> str:
        return self.positioned("embedding", hidden) if self.parameters.where == "embedding" else hidden

    def project(self, layer: str, hidden: str, weights: LayerWeights) -> Projection:
        if weights.positions is not None:
            return self.project_folded(layer, hidden, weights, weights.positions)
        if self.parameters.where == "embedding":
            return super().project(layer, hidden, weights)
        positioned = self.positioned(layer, hidden)
        if self.parameters.where == "query_key_value":
            return super().project(layer, positioned, weights)
        return self.project_inline(layer, hidden, positioned, weights)

    def project_inline(self, layer: str, hidden: str, positioned: str, weights: LayerWeights) -> Projection:
        """Positions inside the query/key product, as an exporter that knows nothing of ExPE leaves them."""
        queries, keys = self.sizes
        if self.parameters.relative:
            started = self.positioned(f"{layer}.query", hidden, constant=True)
            query = self.linear(f"{layer}.q", started, weights.qkv[:, :queries])
            key = self.linear(f"{layer}.k", positioned, weights.qkv[:, queries : queries + keys])
            value = self.linear(f"{layer}.v", hidden, weights.qkv[:, queries + keys :])
            return Projection(query, key, value)
        product = self.linear(f"{layer}.qk", positioned, weights.qkv[:, : queries + keys])
        sizes = self.graph.ints(queries, keys)
        query, key = self.graph.multi("Split", [product, sizes], 2, name=f"{layer}.split", axis=-1)
        value = self.linear(f"{layer}.v", hidden, weights.qkv[:, queries + keys :])
        return Projection(query, key, value)

    def project_folded(self, layer: str, hidden: str, weights: LayerWeights, positions: FoldedPositions) -> Projection:
        """One product over content; positions beside it, and in the scores' bias."""
        graph, plain = self.graph, super().project(layer, hidden, weights)
        query = self.affine(f"{layer}.query", plain.query, positions.query_start, positions.query_limbs)
        if "temperature" in self.shared:
            query = graph.op("Mul", query, self.shared["temperature"], name=f"{layer}.query.tempered")
        bias = self.bias(layer, hidden, positions)
        if positions.value_start is None or positions.value_limbs is None:
            return Projection(query, plain.key, plain.value, bias)
        value = self.affine(f"{layer}.value", plain.value, positions.value_start, positions.value_limbs)
        return Projection(query, plain.key, value, bias, positioned_values=True)

    def affine(self, name: str, states: str, start: Float, limbs: Float | None) -> str:
        """states + start + codes · limbs; nothing grows where limbs are None."""
        graph = self.graph
        if limbs is None:
            return graph.op("Add", states, graph.weight(f"{name}.start", start), name=f"{name}.started")
        grown = graph.op("MatMul", self.shared["codes"], graph.weight(f"{name}.limbs", limbs), name=f"{name}.grown")
        term = graph.op("Add", grown, graph.weight(f"{name}.start", start), name=f"{name}.position")
        return graph.op("Add", states, term, name=f"{name}.positioned")

    def bias(self, layer: str, hidden: str, positions: FoldedPositions) -> str:
        """Σ_g slope_g(i)·(c_g(j) − c_g(i)) for every head, (B, H, T, S)."""
        graph, limbs = self.graph, self.parameters.code.limbs
        content = graph.op("MatMul", hidden, graph.weight(f"{layer}.slope.weight", positions.slope_weight))
        slopes = self.affine(f"{layer}.slope", content, positions.slope_start, positions.slope_limbs)
        slopes = self.softplus(layer, slopes)
        shape = graph.ints(0, 0, self.config.num_attention_heads, limbs)
        slopes = graph.op("Reshape", slopes, shape, name=f"{layer}.slope.heads")
        slopes = graph.op("Transpose", slopes, name=f"{layer}.slopes", perm=[3, 0, 2, 1])  # (G, B, H, T)
        slopes = graph.op("Unsqueeze", slopes, graph.ints(4), name=f"{layer}.slopes")  # (G, B, H, T, 1)
        parts = graph.op("Mul", slopes, self.relative_codes(), name=f"{layer}.bias.limbs")  # (G, B, H, T, S)
        if limbs == 1:
            return graph.op("Squeeze", parts, graph.ints(0), name=f"{layer}.bias")
        return graph.op("ReduceSum", parts, graph.ints(0), name=f"{layer}.bias", keepdims=0)

    def softplus(self, layer: str, slopes: str) -> str:
        """Slopes (B, T, H) kept above 0, and content heads' at 0, from slopes times their sharpness."""
        heads = self.config.num_attention_heads
        sharpness = self.parameters.sharpness(heads)
        if sharpness is None:
            return slopes
        scale = np.logical_not(self.parameters.content(heads)) / np.array(sharpness)
        positive = self.graph.op("Softplus", slopes, name=f"{layer}.slope.positive")
        constant = self.graph.constant(scale.astype(np.float32))
        return self.graph.op("Mul", positive, constant, name=f"{layer}.slope.softplus")

    def key_codes(self, code: PositionCode) -> str:
        """c_g(j), (G, B or 1, 1, 1, S) float32."""
        graph, keys = self.graph, self.codes("keys", self.key_positions(), code)
        if self.growing_cache:  # (B, 1, 1, S, G)
            return graph.op("Transpose", keys, name="keys.limbs", perm=[4, 0, 1, 2, 3])
        keys = graph.op("Transpose", keys, name="keys.limbs", perm=[1, 0])  # (G, S)
        return graph.op("Unsqueeze", keys, graph.ints(1, 2, 3), name="keys.limbs")

    def relative_codes(self) -> str:
        """c_g(j) − c_g(i), (G, B, 1, T, S) float32, once for all layers; for one limb the distance itself."""
        if "relative_codes" not in self.shared:
            graph, code = self.graph, self.parameters.code
            if code.limbs == 1:
                distance = graph.op("Cast", self.distances(), name="distances.float", to=1)
                self.shared["relative_codes"] = graph.op("Unsqueeze", distance, graph.ints(0), name="codes.relative")
            else:
                keys = self.key_codes(code)
                queries = graph.op("Transpose", self.shared["codes"], name="queries.limbs", perm=[2, 0, 1])
                queries = graph.op("Unsqueeze", queries, graph.ints(2, 4), name="queries.limbs")  # (G, B, 1, T, 1)
                self.shared["relative_codes"] = graph.op("Sub", keys, queries, name="codes.relative")
        return self.shared["relative_codes"]


#: Name of the encoding to its emitter.
POSITION_NODES: dict[str, type[PositionNodes]] = {
    "expe": ExPENodes,
    "exqpe": ExPENodes,
    "rotary": RotaryNodes,
    "sinusoidal": SinusoidalNodes,
    "relative": RelativeNodes,
    "alibi": ALiBiNodes,
    "none": PositionNodes,
}
