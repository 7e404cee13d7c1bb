"""RMSNorm and the residual stream as nodes."""

from __future__ import annotations

from dataclasses import dataclass

from expe_edge.graph.nodes import MICROSOFT, GraphBuilder
from expe_edge.graph.weights import Float
from expe_edge.model.config import ExPEConfig


@dataclass
class StandardNorms:
    """In standard operators."""

    graph: GraphBuilder
    config: ExPEConfig

    def norm(self, name: str, gain: Float, hidden: str) -> str:
        """Append the RMSNorm of `hidden` (B, T, C) in the form that onnxruntime fuses into one kernel."""
        graph, hidden = self.graph, self.graph.widen(hidden, name)
        squares = graph.op("Pow", hidden, graph.scalar(2.0), name=f"{name}.square")
        mean = graph.op("ReduceMean", squares, graph.ints(-1), name=f"{name}.mean", keepdims=1)
        shifted = graph.op("Add", mean, graph.scalar(self.config.rms_norm_eps), name=f"{name}.shifted")
        root = graph.op("Sqrt", shifted, name=f"{name}.root")
        scaled = graph.op("Div", hidden, root, name=f"{name}.scaled")
        return graph.narrow(graph.op("Mul", scaled, graph.weight(f"{name}.gain", gain), name=name), name)

    def add(self, name: str, hidden: str, written: str, norm: str, gain: Float) -> tuple[str, str]:
        """Append the sum of `hidden` and `written` (B, T, C), and its RMSNorm; return both."""
        total = self.graph.op("Add", hidden, written, name=name)
        return total, self.norm(norm, gain, total)


class FusedNorms(StandardNorms):
    """The sum and its norm in one node.

    com.microsoft::SkipSimplifiedLayerNormalization,
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
    """

    def add(self, name: str, hidden: str, written: str, norm: str, gain: Float) -> tuple[str, str]:
        del name
        graph = self.graph
        normed, total = graph.tensor(), graph.tensor()
        graph.emit(
            "SkipSimplifiedLayerNormalization",
            [hidden, written, graph.parameter(f"{norm}.gain", gain)],
            [normed, "", "", total],
            name=norm,
            domain=MICROSOFT,
            epsilon=self.config.rms_norm_eps,
        )
        return total, normed
