"""ExPE and ExQPE as nodes: positions are integer codes, beside the products where they are folded out of them."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from expe_edge.graph.encoding import Bias, PositionNodes, Projection, Span, by_head, heads_of
from expe_edge.graph.nodes import GraphBuilder
from expe_edge.graph.weights import FoldedPositions, LayerWeights
from expe_edge.positions.codes import PositionCode
from expe_edge.positions.expe import ExPEParameters


class ExPENodes(PositionNodes):
    """ExPE and ExQPE. Positions are integer codes; they enter as p_n only where they cannot be, or are not, folded."""

    parameters: ExPEParameters

    def begin(self) -> None:
        distances_alone = self.weights.folded and self.parameters.relative and self.parameters.code.limbs == 1
        if not distances_alone:
            self.shared["codes"] = self.codes("queries", self.positions, self.parameters.code.stored)
        if self.parameters.temperature:
            self.shared["temperature"] = self.graph.narrow(self.temperature(), "temperature")

    def temperature(self) -> str:
        """What queries that see n keys are multiplied by, (B, T, (H + 2·Hkv)·D): 1 + c·ln(n/N) in content heads.

        It is 1 in others, and for the keys and values that stand behind the queries.
        """
        graph, heads = self.graph, self.config.num_attention_heads
        strength = self.parameters.temperature * np.array(self.parameters.content(heads), dtype=np.float32)
        strengths = graph.constant(np.pad(np.repeat(strength, self.config.head_dim), (0, 2 * self.sizes[1])))
        seen = graph.op("Add", self.float_positions(), graph.scalar(1.0), name="temperature.seen")
        growth = graph.op("Div", seen, graph.scalar(float(self.config.training_length)), name="temperature.lengths")
        grown = graph.op("Mul", self._logarithm(growth), strengths, name="temperature.grown")
        return graph.op("Add", grown, graph.scalar(1.0), name="temperature")

    def _logarithm(self, lengths: str) -> str:
        """Append ln of (B, T, 1) float32, in float64 unless the graph is portable.

        In float32 its last bit depends on how many others are taken beside it, so that a row of a batch would differ
        from the same row alone. Not every engine that portable graphs are for has float64: WebGPU's has none.
        """
        graph = self.graph
        if self.growing_cache:
            return graph.op("Log", lengths, name="temperature.growth")
        double = graph.op("Cast", lengths, name="temperature.double", to=int(TensorProto.DOUBLE))
        growth = graph.op("Log", double, name="temperature.growth")
        return graph.op("Cast", growth, name="temperature.float", to=int(TensorProto.FLOAT))

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
        graph, product = self.graph, f"{layer}.qkv"
        fused = self.linear(product, hidden, weights.qkv, bias=positions.start(self.sizes[1]))
        limbs = positions.limbs(self.sizes[1])
        if limbs is not None:
            grown = graph.op("MatMul", self.shared["codes"], graph.weight(f"{product}.limbs", limbs))
            fused = graph.op("Add", fused, grown, name=f"{product}.positioned")
        if "temperature" in self.shared:
            fused = graph.op("Mul", fused, self.shared["temperature"], name=f"{product}.tempered")
        return Projection(
            fused,
            biases=self.layer_biases(layer, hidden, positions),
            positioned_values=positions.value_start is not None,
        )

    def layer_biases(self, layer: str, hidden: str, positions: FoldedPositions) -> tuple[Bias | None, ...]:
        """What is added to the scores of every group of heads in one layer."""
        slopes = self.slopes(layer, hidden, positions)
        if self.parameters.code.limbs > 1:
            return (self.bias_of_limbs(layer, slopes),)
        parts = [slopes]
        if len(self.spans) > 1:
            sizes = self.graph.ints(*(span.end - span.begin for span in self.spans))
            parts = self.graph.multi("Split", [slopes, sizes], len(self.spans), name=f"{layer}.slope.groups", axis=1)
        return tuple(self.bias(layer, part, span) for part, span in zip(parts, self.spans, strict=True))

    def bias(self, layer: str, slopes: str, span: Span) -> Bias | None:
        """slope(i)·(j − i) for the heads of a group, of their slopes (B, H, T); None where all are 0."""
        content = self.parameters.content(self.config.num_attention_heads)[span.begin : span.end]
        if all(content):
            return None
        distances, heads = self.float_distances(span), span.end - span.begin

        def emit(graph: GraphBuilder, begin: int, end: int) -> str:
            if all(content[begin:end]):
                return ""
            part = heads_of(graph, slopes, begin, end, heads)
            return graph.function("SlopeBias", [part, distances], _slope_bias, name=layer, last="bias")

        return emit

    def bias_of_limbs(self, layer: str, slopes: str) -> Bias:
        """Σ_g slope_g(i)·(c_g(j) − c_g(i)) for every head, of slopes (B, H·G, T)."""
        limbs, heads, codes = self.parameters.code.limbs, self.config.num_attention_heads, self.relative_codes()

        def emit(graph: GraphBuilder, begin: int, end: int) -> str:
            part = heads_of(graph, slopes, begin * limbs, end * limbs, heads * limbs)
            part = graph.op("Reshape", part, graph.ints(0, end - begin, limbs, -1), name=f"{layer}.slope.heads")
            part = graph.op("Transpose", part, name=f"{layer}.slopes", perm=[2, 0, 1, 3])  # (G, B, H, T)
            part = graph.op("Unsqueeze", part, graph.ints(4), name=f"{layer}.slopes")
            parts = graph.op("Mul", part, codes, name=f"{layer}.bias.limbs")  # (G, B, H, T, S)
            return graph.op("ReduceSum", parts, graph.ints(0), name=f"{layer}.bias", keepdims=0)

        return emit

    def slopes(self, layer: str, hidden: str, positions: FoldedPositions) -> str:
        """Slopes of every head and limb, (B, H·G, T)."""
        graph, name = self.graph, f"{layer}.slope"
        heads = self.config.num_attention_heads
        sharpness = self.parameters.sharpness(heads)
        weight = graph.weight(f"{name}.weight", positions.slope_weight.T)
        start = graph.weight(f"{name}.start", positions.slope_start[:, None])
        if sharpness is not None:  # of the relative form, whose slopes do not grow
            scale = np.logical_not(self.parameters.content(heads)) / np.array(sharpness)
            scales = graph.constant(scale.astype(np.float32)[:, None])
            return graph.function("Slopes", [hidden, weight, start, scales], _slopes, name=layer, last="slope.softplus")
        slopes = by_head(graph, hidden, weight, name)
        if positions.slope_limbs is not None:
            limbs = graph.weight(f"{name}.limbs", positions.slope_limbs.T)
            grown = by_head(graph, self.shared["codes"], limbs, f"{name}.limbs")
            slopes = graph.op("Add", slopes, grown, name=f"{name}.grown")
        return graph.op("Add", slopes, start, name=f"{name}.started")

    def key_codes(self, code: PositionCode) -> str:
        """c_g(j), (G, B or 1, 1, 1, S) float32."""
        graph, keys = self.graph, self.codes("keys", self.key_positions(), code)
        if self.growing_cache:  # (B, 1, 1, S, G)
            return graph.op("Transpose", keys, name="keys.limbs", perm=[4, 0, 1, 2, 3])
        keys = graph.op("Transpose", keys, name="keys.limbs", perm=[1, 0])  # (G, S)
        return graph.op("Unsqueeze", keys, graph.ints(1, 2, 3), name="keys.limbs")

    def relative_codes(self) -> str:
        """c_g(j) − c_g(i), (G, B, 1, T, S) float32, once for all layers."""
        if "relative_codes" not in self.shared:
            graph = self.graph
            keys = self.key_codes(self.parameters.code)
            queries = graph.op("Transpose", self.shared["codes"], name="queries.limbs", perm=[2, 0, 1])
            queries = graph.op("Unsqueeze", queries, graph.ints(2, 4), name="queries.limbs")  # (G, B, 1, T, 1)
            self.shared["relative_codes"] = graph.op("Sub", keys, queries, name="codes.relative")
        return self.shared["relative_codes"]


def _slopes(graph: GraphBuilder, name: str, hidden: str, weight: str, start: str, scale: str) -> str:
    """Append slopes (B, H, T) kept above 0: `scale` (H, 1), 0 in content heads, times a softplus of what is learned."""
    slopes = graph.op("Add", by_head(graph, hidden, weight, f"{name}.slope"), start, name=f"{name}.slope.started")
    positive = graph.op("Softplus", slopes, name=f"{name}.slope.positive")
    return graph.op("Mul", positive, scale, name=f"{name}.slope.softplus")


def _slope_bias(graph: GraphBuilder, name: str, slopes: str, distances: str) -> str:
    """Append slope(i)·(j − i), (B, H, T, S), of slopes (B, H, T) and distances (B or 1, 1, T, S)."""
    slopes = graph.op("Unsqueeze", slopes, graph.ints(3), name=f"{name}.slopes")
    return graph.op("Mul", slopes, distances, name=f"{name}.bias")
