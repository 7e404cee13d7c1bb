"""Int8: weights with a scale for each output channel, activations with one range for the whole tensor.

Weights are symmetric and stored as uint8 around the zero point 128. On x86 without VNNI the kernel for uint8
activations and *int8* weights adds pairs of products in 16 bits and saturates; the one for two uint8 operands does not.
With weights of 7 bits no pair can overflow, so they are stored as int8, whose kernel is the faster one there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expe_edge.quant.blocks import Float, storable

#: A tensor's lowest and highest value on calibration text.
Range = tuple[float, float]

#: Largest magnitude of a symmetric weight of 8 and of 7 bits.
LIMIT_8_BIT, LIMIT_7_BIT = 127, 63
ZERO_POINT = 128
ACTIVATION_LEVELS = 255


class ChannelCodes(NamedTuple):
    """values: (C_in, C_out) uint8 or int8 · scale: (C_out,) float32 · zero_point: 128 or 0.

    The matrix is (values − zero_point)·scale.
    """

    values: npt.NDArray[np.uint8] | npt.NDArray[np.int8]
    scale: Float
    zero_point: int

    @property
    def zero_points(self) -> npt.NDArray[np.generic]:
        """The zero point of every channel, (C_out,), of the values' type."""
        return np.full(self.scale.shape, self.zero_point).astype(self.values.dtype)

    def restored(self) -> Float:
        """Return the matrix that the codes stand for, (C_in, C_out)."""
        matrix: Float = (self.values.astype(np.float32) - self.zero_point) * self.scale
        return matrix


class CacheScales(NamedTuple):
    """An int8 cache of one layer: what one level of each channel is worth. key, value: (Hkv, D)."""

    key: Float
    value: Float


def quantize_channels(weight: Float, *, reduce_range: bool = False) -> ChannelCodes:
    """Round (C_in, C_out) float32 to the nearest of 255 levels per output channel; of 127 with `reduce_range`."""
    limit = LIMIT_7_BIT if reduce_range else LIMIT_8_BIT
    scale = np.abs(weight).max(axis=0) / limit
    scale = storable(np.where(scale == 0, 1, scale))
    levels = np.clip(np.rint(weight / scale), -limit, limit)
    if reduce_range:
        return ChannelCodes(levels.astype(np.int8), scale, 0)
    return ChannelCodes((levels + ZERO_POINT).astype(np.uint8), scale, ZERO_POINT)


def activation_scale(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Return scale and zero point of uint8 for values in [low, high], with 0 exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / ACTIVATION_LEVELS) or np.float32(1)
    return scale, np.uint8(np.clip(np.rint(-low / scale), 0, ACTIVATION_LEVELS))


def round_activations(hidden: Float, low: float, high: float) -> Float:
    """Return `hidden` rounded to the uint8 levels of [low, high]."""
    scale, zero = activation_scale(low, high)
    codes = np.clip(np.rint(hidden / scale) + zero, 0, ACTIVATION_LEVELS)
    rounded: Float = ((codes - zero) * scale).astype(np.float32)
    return rounded
