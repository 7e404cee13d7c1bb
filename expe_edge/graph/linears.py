"""Linear formats: how a weight is stored, and how the product with it is taken. One registry; one builder for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from onnx import TensorProto

from expe_edge.errors import ConfigError, ExportError, unknown_name
from expe_edge.graph.matrices import BlockMatrix, ChannelMatrix, FloatMatrix, StoredMatrix
from expe_edge.graph.nodes import FLOAT, FLOAT16, MICROSOFT, GraphBuilder
from expe_edge.quant.blocks import Float
from expe_edge.quant.channels import REDUCED_BITS, Range, activation_scale, channel_codes, round_activations
from expe_edge.quant.recipe import WEIGHT_BITS
from expe_edge.quant.solvers import MOMENT_SOLVERS, WeightQuantizer

#: The range of rows divided by their largest magnitude, and the divisor of rows that are all zero.
UNIT: Range = (-1.0, 1.0)
SMALLEST_PEAK = 1e-20

Matrix = TypeVar("Matrix", bound=StoredMatrix)


@dataclass(frozen=True)
class FormatOptions:
    """What formats are made with.

    reduce_range: 7-bit weights in the int8 formats. portable: standard operators alone.
    ranges: of every linear's input, for static formats. quantizer: of the weights of integer formats.
    """

    reduce_range: bool = False
    portable: bool = False
    ranges: Mapping[str, Range] = field(default_factory=dict)
    quantizer: WeightQuantizer = field(default_factory=WeightQuantizer)


@dataclass(frozen=True)
class LinearFormat(ABC, Generic[Matrix]):
    """How the product of (…, C_in) with a weight (C_in, C_out) is stored and computed."""

    options: FormatOptions = FormatOptions()

    name: ClassVar[str]
    #: The kernel that onnxruntime's optimised graph computes each linear by.
    kernel: ClassVar[str] = "MatMul"
    #: Whether activations are rounded to one range for the whole tensor.
    rounds_activations: ClassVar[bool] = False
    #: Whether that range is fixed, so that `product` needs `options.ranges`.
    calibrated: ClassVar[bool] = False
    #: The embedding's format where nothing else is asked for.
    embedding: ClassVar[str] = "float32"
    #: The oldest onnxruntime with the kernel on CPUs; of a portable package, that runs it, be it by slower kernels, and
    #: that makes one kernel of its operators, as an export verifies. since_half: with the kernel on float16.
    since: ClassVar[str] = "1.17"
    since_half: ClassVar[str] = "1.17"
    portable_since: ClassVar[str] = "1.17"
    fused_since: ClassVar[str] = "1.17"

    @abstractmethod
    def store(self, linear: str, weight: Float) -> Matrix:
        """Return the weight (C_in, C_out) of `linear` as it will be stored."""

    @abstractmethod
    def product(
        self, graph: GraphBuilder, linear: str, hidden: str, matrix: Matrix, *, within: Range | None = None
    ) -> str:
        """Append the product itself. within: a range that `hidden` is known to stay in."""

    def biased(self, graph: GraphBuilder, linear: str, hidden: str, matrix: Matrix, bias: str) -> str:
        """Append the product and the addition of `bias` (C_out,). onnxruntime makes one node of it where it can."""
        return graph.op("Add", self.product(graph, linear, hidden, matrix), bias, name=f"{linear}.biased")

    def emit(
        self,
        graph: GraphBuilder,
        linear: str,
        hidden: str,
        matrix: Matrix,
        *,
        bias: Float | None = None,
        peaked: bool = False,
    ) -> str:
        """Append the nodes of linear `linear` on tensor `hidden`; return the name of its output.

        Args:
            matrix: of this format's `store`; an embedding, where the head is tied to it.
            bias: (C_out,), added to the product in float32; of linears that are not peaked.
            peaked: the input's largest value differs much from token to token, as behind a gate. Rounding then acts
                on rows divided by their largest magnitude, W·x = m·(W·(x/m)), exactly as good a product, so that
                one token's peak does not coarsen the others.
        """
        if bias is not None:
            return self.biased(graph, linear, hidden, matrix, graph.parameter(f"{linear}.bias", bias))
        if not (peaked and self.rounds_activations):
            return self.product(graph, linear, hidden, matrix)
        magnitudes = graph.op("Abs", hidden, name=f"{linear}.magnitudes")
        peak = graph.op("ReduceMax", magnitudes, graph.ints(-1), name=f"{linear}.peak", keepdims=1)
        peak = graph.op("Max", peak, graph.scalar(SMALLEST_PEAK), name=f"{linear}.peak")
        rows = graph.op("Div", hidden, peak, name=f"{linear}.rows")
        product = self.product(graph, linear, rows, matrix, within=UNIT)
        return graph.op("Mul", product, peak, name=f"{linear}.restored")

    def round_inputs(self, linear: str, hidden: Float, *, peaked: bool = False) -> Float:
        """Return rows `hidden` (n, C_in) as the product sees them."""
        del linear, peaked
        return hidden


class Float32(LinearFormat[FloatMatrix]):
    """Plain float32."""

    name = "float32"
    element: ClassVar[int] = FLOAT

    def store(self, linear: str, weight: Float) -> FloatMatrix:
        return FloatMatrix(weight, self.element)

    def product(
        self, graph: GraphBuilder, linear: str, hidden: str, matrix: FloatMatrix, *, within: Range | None = None
    ) -> str:
        del within
        return graph.op("MatMul", hidden, matrix.floats(graph, linear), name=linear)


class Float16(Float32):
    """Stored in half precision, computed in float32 on CPUs, which have no product of their own for it."""

    name = embedding = "float16"
    element = FLOAT16


class BFloat16(Float32):
    """Stored in bfloat16, computed in float32."""

    name = embedding = "bfloat16"
    element = int(TensorProto.BFLOAT16)


class ChannelInt8(LinearFormat[ChannelMatrix]):
    """What the two int8 formats share: weights with a scale for each output channel."""

    rounds_activations = True
    embedding = "int8"

    def store(self, linear: str, weight: Float) -> ChannelMatrix:
        bits = REDUCED_BITS if self.options.reduce_range else 8
        codes = self.options.quantizer.quantize(linear, weight, bits, block_size=len(weight))
        return ChannelMatrix(channel_codes(codes))

    def round_inputs(self, linear: str, hidden: Float, *, peaked: bool = False) -> Float:
        if not peaked:
            return round_activations(hidden, *self.bounds(linear, hidden))
        peak = np.maximum(np.abs(hidden).max(axis=1, keepdims=True), SMALLEST_PEAK)
        rows = hidden / peak
        rounded: Float = round_activations(rows, *(UNIT if self.calibrated else self.bounds(linear, rows))) * peak
        return rounded

    def bounds(self, linear: str, hidden: Float) -> Range:
        """The range that activations are rounded in."""
        return float(hidden.min()), float(hidden.max())


class DynamicInt8(ChannelInt8):
    """Int8 product; the activations' range is measured at run time, per tensor (DynamicQuantizeLinear)."""

    name = "int8-dynamic"
    kernel = "DynamicQuantizeMatMul"

    def product(
        self, graph: GraphBuilder, linear: str, hidden: str, matrix: ChannelMatrix, *, within: Range | None = None
    ) -> str:
        del within
        values, scale, zero_points = matrix.integers(graph, linear)
        codes, step, zero = graph.multi("DynamicQuantizeLinear", [hidden], 3, name=f"{linear}.quantize")
        product = graph.op("MatMulInteger", codes, values, zero, zero_points, name=f"{linear}.integer")
        product = graph.op("Cast", product, name=f"{linear}.cast", to=FLOAT)
        return graph.op("Mul", product, graph.op("Mul", step, scale, name=f"{linear}.rescale"), name=linear)


class StaticInt8(ChannelInt8):
    """Int8 product with ranges fixed by calibration (QuantizeLinear / DequantizeLinear around a MatMul)."""

    name = "int8-static"
    kernel = "MatMulIntegerToFloat"
    calibrated = True

    def bounds(self, linear: str, hidden: Float | None = None) -> Range:
        if linear not in self.options.ranges:
            raise ExportError(f"calibration measured no range for {linear!r}")
        return self.options.ranges[linear]

    def product(
        self, graph: GraphBuilder, linear: str, hidden: str, matrix: ChannelMatrix, *, within: Range | None = None
    ) -> str:
        scale, zero = activation_scale(*(within or self.bounds(linear)))
        parameters = [graph.scalar(float(scale)), graph.scalar(int(zero), np.uint8)]
        codes = graph.op("QuantizeLinear", hidden, *parameters, name=f"{linear}.quantize")
        restored = graph.op("DequantizeLinear", codes, *parameters, name=f"{linear}.dequantize")
        return graph.op("MatMul", restored, matrix.floats(graph, linear), name=linear)


#: MatMulNBits' accuracy level: activations in int8 with a scale for each block, as other runtimes have it. With float
#: activations decoding is many times slower. GPUs leave activations as they are.
INT8_ACTIVATIONS, HALF_ACTIVATIONS = 4, 2


class BlockWeight(LinearFormat[BlockMatrix]):
    """Weights of few bits in blocks, activations as they are (com.microsoft::MatMulNBits).

    In standard operators: a DequantizeLinear by blocks and a MatMul, which onnxruntime fuses into the same kernel.
    """

    kernel = "MatMulNBits"
    embedding = "int8"
    bits: ClassVar[int]

    def store(self, linear: str, weight: Float) -> BlockMatrix:
        return BlockMatrix(self.options.quantizer.quantize(linear, weight, self.bits))

    def product(
        self, graph: GraphBuilder, linear: str, hidden: str, matrix: BlockMatrix, *, within: Range | None = None
    ) -> str:
        del within
        if self.options.portable:
            return graph.op("MatMul", hidden, matrix.floats(graph, linear), name=linear)
        return self._blocks(graph, linear, hidden, matrix)

    def biased(self, graph: GraphBuilder, linear: str, hidden: str, matrix: BlockMatrix, bias: str) -> str:
        if self.options.portable:
            return super().biased(graph, linear, hidden, matrix, bias)
        return self._blocks(graph, linear, hidden, matrix, "", "", bias)  # no zero points, no order of groups

    def _blocks(self, graph: GraphBuilder, linear: str, hidden: str, matrix: BlockMatrix, *optional: str) -> str:
        codes = matrix.codes
        sizes = {"K": codes.columns, "N": len(codes.scale), "bits": self.bits, "block_size": codes.block_size}
        return graph.op(
            "MatMulNBits",
            hidden,
            *matrix.packed(graph, linear),
            *optional,
            name=linear,
            domain=MICROSOFT,
            accuracy_level=INT8_ACTIVATIONS if graph.element == FLOAT else HALF_ACTIVATIONS,
            **sizes,
        )


class Int8Weight(BlockWeight):
    """8-bit weights."""

    name = "int8-weight"
    bits = 8
    since = "1.22"
    since_half = "1.23"
    portable_since = "1.20"
    fused_since = "1.25"


class Int4Weight(BlockWeight):
    """4-bit weights."""

    name = "int4-weight"
    bits = 4
    since = since_half = "1.20"
    portable_since = "1.20"
    fused_since = "1.20"


#: The registry of linear formats.
LINEAR_FORMATS: dict[str, type[LinearFormat[Any]]] = {
    kind.name: kind for kind in (Float32, Float16, BFloat16, DynamicInt8, StaticInt8, Int8Weight, Int4Weight)
}


def make_format(name: str, options: FormatOptions | None = None) -> LinearFormat[Any]:
    """Return the format `name`."""
    if name not in LINEAR_FORMATS:
        raise ConfigError(unknown_name("precision", name, LINEAR_FORMATS) + "; change `precision`")
    return LINEAR_FORMATS[name](options or FormatOptions())


def needs_moments(name: str, solver: str) -> bool:
    """Tell whether the format `name` needs the inputs' moments."""
    return name in WEIGHT_BITS and solver in MOMENT_SOLVERS
