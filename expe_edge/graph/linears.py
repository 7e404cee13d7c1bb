"""Linear formats: how one weight matrix is stored and becomes nodes. One registry; the graph is built once for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from onnx import TensorProto

from expe_edge.errors import ConfigError, ExportError, unknown_name
from expe_edge.graph.embeddings import FLOAT, BlockTable, ChannelTable, FloatTable, Table
from expe_edge.graph.nodes import MICROSOFT, GraphBuilder
from expe_edge.quant.blocks import BlockCodes, Float, midpoint
from expe_edge.quant.channels import (
    REDUCED_BITS,
    ChannelCodes,
    Range,
    activation_scale,
    channel_codes,
    round_activations,
)
from expe_edge.quant.recipe import WEIGHT_BITS
from expe_edge.quant.solvers import MOMENT_SOLVERS, WeightQuantizer

#: The range of rows divided by their largest magnitude, and the divisor of rows that are all zero.
UNIT: Range = (-1.0, 1.0)
SMALLEST_PEAK = 1e-20


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
class LinearFormat(ABC):
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
    #: The oldest onnxruntime with the kernel on CPUs; of a portable package, that runs it, be it by slower kernels.
    since: ClassVar[str] = "1.17"
    portable_since: ClassVar[str] = "1.17"

    def emit(
        self, graph: GraphBuilder, linear: str, hidden: str, weight: Float, *, peaked: bool = False,
        tied: Table | None = None,
    ) -> str:  # fmt: skip
        """Append the nodes of linear `linear` on tensor `hidden`; return the name of its float32 output.

        Args:
            peaked: the input's largest value differs much from token to token, as behind a gate. Rounding then acts
                on rows divided by their largest magnitude, W·x = m·(W·(x/m)), exactly as good a product, so that
                one token's peak does not coarsen the others.
            tied: the stored embedding that the weight is the transpose of, made by this format's `table`.
        """
        if not (peaked and self.rounds_activations):
            return self.product(graph, linear, hidden, weight, tied=tied)
        magnitudes = graph.op("Abs", hidden, name=f"{linear}.magnitudes")
        peak = graph.op("ReduceMax", magnitudes, graph.ints(-1), name=f"{linear}.peak", keepdims=1)
        peak = graph.op("Max", peak, graph.scalar(SMALLEST_PEAK), name=f"{linear}.peak")
        rows = graph.op("Div", hidden, peak, name=f"{linear}.rows")
        product = self.product(graph, linear, rows, weight, within=UNIT, tied=tied)
        return graph.op("Mul", product, peak, name=f"{linear}.restored")

    @abstractmethod
    def product(
        self, graph: GraphBuilder, linear: str, hidden: str, weight: Float, *, within: Range | None = None,
        tied: Table | None = None,
    ) -> str:  # fmt: skip
        """Append the product itself. within: a range that `hidden` is known to stay in."""

    @abstractmethod
    def table(self, linear: str, weight: Float) -> Table:
        """Return the embedding that a head `linear` with `weight` (C, V) shares its storage with."""

    @abstractmethod
    def restored(self, linear: str, weight: Float) -> Float:
        """Return the weight (C_in, C_out) as stored."""

    def round_inputs(self, linear: str, hidden: Float, *, peaked: bool = False) -> Float:
        """Return rows `hidden` (n, C_in) as the product sees them."""
        del linear, peaked
        return hidden


class Float32(LinearFormat):
    """Plain float32."""

    name = "float32"
    element: ClassVar[int] = FLOAT

    def product(
        self, graph: GraphBuilder, linear: str, hidden: str, weight: Float, *, within: Range | None = None,
        tied: Table | None = None,
    ) -> str:  # fmt: skip
        del within
        if tied is not None:
            matrix = graph.op("Transpose", tied.weight, name=f"{linear}.tied", perm=[1, 0])
        else:
            matrix = graph.floats(f"{linear}.weight", weight, self.element)
        if self.element != FLOAT:
            matrix = graph.op("Cast", matrix, name=f"{linear}.float", to=FLOAT)
        return graph.op("MatMul", hidden, matrix, name=linear)

    def table(self, linear: str, weight: Float) -> Table:
        return FloatTable(weight.T, self.element)

    def restored(self, linear: str, weight: Float) -> Float:
        return GraphBuilder.rounded(weight, self.element)


class Float16(Float32):
    """Stored in half precision, computed in float32: CPUs have no product of their own for it."""

    name = embedding = "float16"
    element = int(TensorProto.FLOAT16)


class BFloat16(Float32):
    """Stored in bfloat16, computed in float32."""

    name = embedding = "bfloat16"
    element = int(TensorProto.BFLOAT16)


class ChannelInt8(LinearFormat):
    """What the two int8 formats share: weights with a scale for each output channel."""

    rounds_activations = True
    embedding = "int8"

    def quantized(self, linear: str, weight: Float) -> ChannelCodes:
        bits = REDUCED_BITS if self.options.reduce_range else 8
        return channel_codes(self.options.quantizer.quantize(linear, weight, bits, block_size=len(weight)))

    def store(self, graph: GraphBuilder, linear: str, weight: Float, tied: Table | None) -> tuple[str, str, str]:
        """Return the tensors of the codes (C_in, C_out), their scales and zero points (C_out,)."""
        codes = self.quantized(linear, weight)
        zero_points = graph.constant(codes.zero_points)
        if tied is not None:
            return graph.op("Transpose", tied.weight, name=f"{linear}.tied", perm=[1, 0]), tied.scale, zero_points
        stored = graph.weight(f"{linear}.weight", codes.values)
        return stored, graph.scales(f"{linear}.scale", codes.scale), zero_points

    def table(self, linear: str, weight: Float) -> Table:
        return ChannelTable(self.quantized(linear, weight))

    def restored(self, linear: str, weight: Float) -> Float:
        return self.quantized(linear, weight).restored()

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
        self, graph: GraphBuilder, linear: str, hidden: str, weight: Float, *, within: Range | None = None,
        tied: Table | None = None,
    ) -> str:  # fmt: skip
        del within
        values, scale, zero_points = self.store(graph, linear, weight, tied)
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
        self, graph: GraphBuilder, linear: str, hidden: str, weight: Float, *, within: Range | None = None,
        tied: Table | None = None,
    ) -> str:  # fmt: skip
        scale, zero = activation_scale(*(within or self.bounds(linear)))
        parameters = [graph.scalar(float(scale)), graph.scalar(int(zero), np.uint8)]
        codes = graph.op("QuantizeLinear", hidden, *parameters, name=f"{linear}.quantize")
        restored = graph.op("DequantizeLinear", codes, *parameters, name=f"{linear}.dequantize")
        stored = self.store(graph, linear, weight, tied)
        matrix = graph.op("DequantizeLinear", *stored, name=f"{linear}.matrix", axis=1)
        return graph.op("MatMul", restored, matrix, name=linear)


#: MatMulNBits' accuracy level: activations in int8 with a scale for each block, as other runtimes have it. With float
#: activations decoding is many times slower.
INT8_ACTIVATIONS = 4


class BlockWeight(LinearFormat):
    """Weights of few bits in blocks, activations as they are (com.microsoft::MatMulNBits).

    In standard operators: a DequantizeLinear by blocks and a MatMul, which onnxruntime fuses into the same kernel.
    """

    kernel = "MatMulNBits"
    embedding = "int8"
    bits: ClassVar[int]

    def quantized(self, linear: str, weight: Float) -> BlockCodes:
        return self.options.quantizer.quantize(linear, weight, self.bits)

    def product(
        self, graph: GraphBuilder, linear: str, hidden: str, weight: Float, *, within: Range | None = None,
        tied: Table | None = None,
    ) -> str:  # fmt: skip
        del within
        codes = self.quantized(linear, weight)
        if self.options.portable:
            return graph.op("MatMul", hidden, self.dequantized(graph, linear, codes, tied), name=linear)
        if tied is not None:
            stored, scale = tied.weight, tied.scale
        else:
            stored = self.store(graph, linear, codes)
            scale = graph.scales(f"{linear}.scale", codes.scale)
        sizes = {"K": weight.shape[0], "N": weight.shape[1], "bits": self.bits, "block_size": codes.block_size}
        return graph.op(
            "MatMulNBits",
            hidden,
            stored,
            scale,
            name=linear,
            domain=MICROSOFT,
            accuracy_level=INT8_ACTIVATIONS,
            **sizes,
        )

    @staticmethod
    def dequantized(graph: GraphBuilder, linear: str, codes: BlockCodes, tied: Table | None) -> str:
        """Append the float matrix (C_in, C_out): stored that way round, without which onnxruntime fuses nothing.

        Codes are signed, so that no zero points are stored; a tied embedding's are its bytes, rearranged.
        """
        if tied is not None:
            assert isinstance(tied, BlockTable)
            stored = tied.columns(graph, linear)
        else:
            store = graph.four_bits if codes.bits == 4 else graph.weight
            stored = [store(f"{linear}.weight", codes.levels()), graph.scales(f"{linear}.scale", codes.scale.T)]
        return graph.op("DequantizeLinear", *stored, name=f"{linear}.matrix", axis=0, block_size=codes.block_size)

    @staticmethod
    def store(graph: GraphBuilder, linear: str, codes: BlockCodes) -> str:
        """Store packed codes without the padding of the last block, which is made at load."""
        packed, bits = codes.packed(), codes.columns * codes.bits
        if codes.columns % codes.block_size == 0 or bits % 8:
            return graph.weight(f"{linear}.weight", packed)
        flat = packed.reshape(len(packed), -1)
        stored = graph.weight(f"{linear}.weight", flat[:, : bits // 8])
        zero = midpoint(codes.bits) * (17 if codes.bits == 4 else 1)  # one byte of zeros
        ends = graph.ints(0, 0, 0, flat.shape[1] - bits // 8)
        padded = graph.op("Pad", stored, ends, graph.scalar(zero, np.uint8), name=f"{linear}.padded")
        return graph.op("Reshape", padded, graph.ints(*packed.shape), name=f"{linear}.blocks")

    def table(self, linear: str, weight: Float) -> Table:
        return BlockTable(self.quantized(linear, weight))

    def restored(self, linear: str, weight: Float) -> Float:
        return self.quantized(linear, weight).restored().T


class Int8Weight(BlockWeight):
    """8-bit weights."""

    name = "int8-weight"
    bits = 8
    since = "1.22"
    portable_since = "1.20"  # as one kernel since 1.25


class Int4Weight(BlockWeight):
    """4-bit weights."""

    name = "int4-weight"
    bits = 4
    since = "1.20"
    portable_since = "1.20"


#: The registry of linear formats.
LINEAR_FORMATS: dict[str, type[LinearFormat]] = {
    kind.name: kind for kind in (Float32, Float16, BFloat16, DynamicInt8, StaticInt8, Int8Weight, Int4Weight)
}


def make_format(name: str, options: FormatOptions | None = None) -> LinearFormat:
    """Return the format `name`."""
    if name not in LINEAR_FORMATS:
        raise ConfigError(unknown_name("precision", name, LINEAR_FORMATS) + "; change `precision`")
    return LINEAR_FORMATS[name](options or FormatOptions())


def needs_moments(name: str, solver: str) -> bool:
    """Tell whether the format `name` needs the inputs' moments."""
    return name in WEIGHT_BITS and solver in MOMENT_SOLVERS
