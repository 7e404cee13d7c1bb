"""Linear formats: how one weight matrix becomes nodes. One registry; the graph is built once for all of them.

Int8 weights are per output channel and symmetric, stored as uint8 around the zero point 128. On x86 without VNNI
the kernel for uint8 activations and *int8* weights adds pairs of products in 16 bits and saturates; the one for two
uint8 operands does not. The integers are the same either way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expe_edge.errors import ConfigError, ExportError, unknown_name
from expe_edge.export.nodes import GraphBuilder

Float = npt.NDArray[np.float32]
#: A tensor's lowest and highest value on calibration text.
Range = tuple[float, float]

#: Largest magnitude of a symmetric int8 weight.
WEIGHT_LIMIT = 127
WEIGHT_ZERO_POINT = 128
ACTIVATION_LEVELS = 255
#: The range of rows divided by their largest magnitude, and the divisor of rows that are all zero.
UNIT: Range = (-1.0, 1.0)
SMALLEST_PEAK = 1e-20


class QuantizedWeight(NamedTuple):
    """values: (C_in, C_out) uint8 · scale: (C_out,) float32 · W ≈ (values − 128)·scale."""

    values: npt.NDArray[np.uint8]
    scale: Float

    @property
    def zero_point(self) -> npt.NDArray[np.uint8]:
        """The zero point of every channel, (C_out,) uint8."""
        return np.full(self.scale.shape, WEIGHT_ZERO_POINT, dtype=np.uint8)


def quantize_weight(weight: Float) -> QuantizedWeight:
    """Round (C_in, C_out) float32 to the nearest of 255 levels per output channel."""
    scale = np.abs(weight).max(axis=0) / WEIGHT_LIMIT
    scale = np.where(scale == 0, 1, scale).astype(np.float32)
    levels = np.clip(np.rint(weight / scale), -WEIGHT_LIMIT, WEIGHT_LIMIT)
    return QuantizedWeight((levels + WEIGHT_ZERO_POINT).astype(np.uint8), scale)


def activation_scale(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Return scale and zero point of uint8 for values in [low, high], with 0 exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / ACTIVATION_LEVELS) or np.float32(1)
    return scale, np.uint8(np.clip(np.rint(-low / scale), 0, ACTIVATION_LEVELS))


class LinearFormat(ABC):
    """How the product of (…, C_in) with a weight (C_in, C_out) is stored and computed."""

    name: str
    #: Whether activations are rounded to one range for the whole tensor.
    rounds_activations = True
    #: Whether that range is fixed, so that `product` needs what calibration measures.
    calibrated = False

    def emit(self, graph: GraphBuilder, linear: str, hidden: str, weight: Float, *, peaked: bool = False) -> str:
        """Append the nodes of linear `linear` on tensor `hidden`; return the name of its float32 output.

        Args:
            peaked: the input's largest value differs much from token to token, as behind a gate. Rounding then acts
                on rows divided by their largest magnitude, W·x = m·(W·(x/m)), exactly as good a product, so that
                one token's peak does not coarsen the others.
        """
        if not (peaked and self.rounds_activations):
            return self.product(graph, linear, hidden, weight)
        magnitudes = graph.op("Abs", hidden, name=f"{linear}.magnitudes")
        peak = graph.op("ReduceMax", magnitudes, graph.ints(-1), name=f"{linear}.peak", keepdims=1)
        peak = graph.op("Max", peak, graph.scalar(SMALLEST_PEAK), name=f"{linear}.peak")
        rows = graph.op("Div", hidden, peak, name=f"{linear}.rows")
        return graph.op("Mul", self.product(graph, linear, rows, weight, within=UNIT), peak, name=f"{linear}.restored")

    @abstractmethod
    def product(self, graph: GraphBuilder, linear: str, hidden: str, weight: Float, within: Range | None = None) -> str:
        """Append the product itself. within: a range that `hidden` is known to stay in."""


@dataclass(frozen=True)
class Float32(LinearFormat):
    """Plain float32."""

    name = "float32"
    rounds_activations = False

    def product(self, graph: GraphBuilder, linear: str, hidden: str, weight: Float, within: Range | None = None) -> str:
        del within
        return graph.op("MatMul", hidden, graph.weight(f"{linear}.weight", weight), name=linear)


@dataclass(frozen=True)
class DynamicInt8(LinearFormat):
    """Int8 product; the activations' range is measured at run time, per tensor (DynamicQuantizeLinear)."""

    name = "int8-dynamic"

    def product(self, graph: GraphBuilder, linear: str, hidden: str, weight: Float, within: Range | None = None) -> str:
        del within
        quantized = quantize_weight(weight)
        values = graph.weight(f"{linear}.weight", quantized.values)
        scale = graph.weight(f"{linear}.scale", quantized.scale)
        codes, step, zero = graph.multi("DynamicQuantizeLinear", [hidden], 3, name=f"{linear}.quantize")
        zero_points = graph.constant(quantized.zero_point)
        product = graph.op("MatMulInteger", codes, values, zero, zero_points, name=f"{linear}.integer")
        product = graph.op("Cast", product, name=f"{linear}.cast", to=1)
        return graph.op("Mul", product, graph.op("Mul", step, scale, name=f"{linear}.rescale"), name=linear)


@dataclass(frozen=True)
class StaticInt8(LinearFormat):
    """Int8 product with ranges fixed by calibration (QuantizeLinear / DequantizeLinear around a MatMul)."""

    name = "int8-static"
    calibrated = True
    ranges: Mapping[str, Range]

    def product(self, graph: GraphBuilder, linear: str, hidden: str, weight: Float, within: Range | None = None) -> str:
        if within is None and linear not in self.ranges:
            raise ExportError(f"calibration measured no range for {linear!r}")
        scale, zero = activation_scale(*(within or self.ranges[linear]))
        parameters = [graph.scalar(float(scale)), graph.scalar(int(zero), np.uint8)]
        codes = graph.op("QuantizeLinear", hidden, *parameters, name=f"{linear}.quantize")
        restored = graph.op("DequantizeLinear", codes, *parameters, name=f"{linear}.dequantize")
        quantized = quantize_weight(weight)
        values = graph.weight(f"{linear}.weight", quantized.values)
        weight_scale = graph.weight(f"{linear}.scale", quantized.scale)
        zero_points = graph.constant(quantized.zero_point)
        matrix = graph.op("DequantizeLinear", values, weight_scale, zero_points, name=f"{linear}.matrix", axis=1)
        return graph.op("MatMul", restored, matrix, name=linear)


#: The registry of linear formats.
LINEAR_FORMATS: dict[str, type[LinearFormat]] = {kind.name: kind for kind in (Float32, DynamicInt8, StaticInt8)}


def make_format(name: str, ranges: Mapping[str, Range] | None = None) -> LinearFormat:
    """Return the format `name`, given the ranges where it needs them."""
    if name not in LINEAR_FORMATS:
        raise ConfigError(unknown_name("precision", name, LINEAR_FORMATS) + "; change --precision")
    kind = LINEAR_FORMATS[name]
    return kind(ranges=ranges or {}) if issubclass(kind, StaticInt8) else kind()
