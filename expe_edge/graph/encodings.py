"""The registry of emitters, and those of the encodings that ExPE is judged against.

The names are those of `model.encodings.POSITIONAL_ENCODINGS`.
"""

from __future__ import annotations

import numpy as np

from expe_edge.graph.encoding import Bias, PositionNodes, Projection, bias_of, split
from expe_edge.graph.expe import ExPENodes
from expe_edge.graph.weights import LayerWeights
from expe_edge.model.encodings import inverse_frequencies
from expe_edge.positions.expe import alibi_slopes
from expe_edge.positions.parameters import RotaryParameters


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
        return self.graph.op("Add", hidden, self.graph.narrow(both, "positions.waves"), name="embedding.positioned")


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
        query, key, value = split(self.graph, self.config, layer, plain.query)
        query, key = self.rotate(f"{layer}.query", query), self.rotate(f"{layer}.key", key)
        return Projection(query, key, value)

    def rotate(self, name: str, states: str) -> str:
        """Turn (B, T, heads·D) by the shared angles."""
        graph, size = self.graph, self.config.head_dim
        states = graph.widen(states, name)
        headed = graph.op("Reshape", states, graph.ints(0, 0, -1, size), name=f"{name}.heads")
        first, second = graph.multi("Split", [headed], 2, name=f"{name}.halves", axis=-1, num_outputs=2)
        cos, sin = self.shared["cos"], self.shared["sin"]
        left = graph.op("Sub", graph.op("Mul", first, cos), graph.op("Mul", second, sin))
        right = graph.op("Add", graph.op("Mul", second, cos), graph.op("Mul", first, sin))
        turned = graph.op("Concat", left, right, name=f"{name}.turned", axis=-1)
        rotated = graph.op("Reshape", turned, graph.ints(0, 0, -1), name=f"{name}.rotated")
        return graph.narrow(rotated, name)


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

    @property
    def biases(self) -> tuple[Bias | None, ...]:
        return (bias_of(self.shared["bias"], self.config.num_attention_heads),)


class ALiBiNodes(PositionNodes):
    """A fixed slope for each head times the distance."""

    def begin(self) -> None:
        slopes = np.array(alibi_slopes(self.config.num_attention_heads), dtype=np.float32).reshape(1, -1, 1, 1)
        for span in self.spans:
            steep = self.graph.constant(slopes[:, span.begin : span.end])
            bias = self.graph.op("Mul", self.float_distances(span), steep, name="alibi.bias")
            self.shared[f"bias.{span.begin}"] = bias

    @property
    def biases(self) -> tuple[Bias | None, ...]:
        return tuple(bias_of(self.shared[f"bias.{span.begin}"], span.end - span.begin) for span in self.spans)


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
