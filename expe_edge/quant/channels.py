"""Int8: weights with a scale for each output channel, activations with one range for the whole tensor.

Weights are symmetric and stored as uint8 around the zero point 128. On x86 without VNNI the kernel for uint8
activations and *int8* weights adds pairs of products in 16 bits and saturates; the one for two uint8 operands does not.
With weights of 7 bits no pair can overflow, so they are stored as int8, whose kernel is the faster one there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expe_edge.quant.blocks import BlockCodes, Float, midpoint, round_to_nearest

#: A tensor's lowest and highest value on calibration text.
Range = tuple[float, float]

#: Bits of weights of a reduced range.
REDUCED_BITS = 7
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


def quantize_channels(weight: Float, bits: int = 8) -> ChannelCodes:
    """Round (C_in, C_out) float32 to the nearest of 255 levels per output channel; of 127 with 7 bits."""
    return channel_codes(round_to_nearest(weight.T, bits, len(weight)))


def channel_codes(rows: BlockCodes) -> ChannelCodes:
    """Return codes (C_out, C_in) of 8 or 7 bits, in one block each, as the int8 kernels want them."""
    scale = rows.scale[:, 0]
    if rows.bits == REDUCED_BITS:
        return ChannelCodes(rows.levels(), scale, 0)
    return ChannelCodes(rows.codes[:, 0].T, scale, midpoint(rows.bits))


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
