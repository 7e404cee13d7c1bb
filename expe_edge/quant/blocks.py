"""Matrices of few-bit integers in blocks: each run of `block` columns of a row has a scale of its own.

The layout is that of com.microsoft::MatMulNBits without zero points:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftmatmulnbits
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]

#: Columns of a block where nothing else is asked for, by bits: 8 bits hold more without help from a near scale.
BLOCK_SIZE = {4: 32, 8: 128}
#: Normal numbers of half precision; a scale in between is stored in it.
SMALLEST_HALF, LARGEST_HALF = 2.0**-14, 65504.0


class BlockCodes(NamedTuple):
    """A matrix (rows, columns), columns padded to whole blocks.

    codes: (rows, blocks, block) uint8, below 2^bits · scale: (rows, blocks) float32, of either sign.
    The matrix is (codes − 2^(bits−1))·scale.
    """

    codes: npt.NDArray[np.uint8]
    scale: Float
    bits: int
    columns: int

    @property
    def block_size(self) -> int:
        """Columns in a block."""
        return int(self.codes.shape[-1])

    def restored(self) -> Float:
        """Return the matrix that the codes stand for, (rows, columns) float32."""
        values = (self.codes.astype(np.float32) - midpoint(self.bits)) * self.scale[..., None]
        matrix: Float = values.reshape(len(values), -1)[:, : self.columns]
        return matrix

    def levels(self) -> npt.NDArray[np.int8]:
        """Return the transpose's codes around 0, (columns, rows) int8."""
        signed = self.codes.reshape(len(self.codes), -1)[:, : self.columns].astype(np.int16) - midpoint(self.bits)
        return signed.astype(np.int8).T

    def packed(self) -> npt.NDArray[np.uint8]:
        """Return the codes as bytes, (rows, blocks, block·bits/8): the earlier of two 4-bit codes in the low half."""
        if self.bits == 8:
            return self.codes
        packed = self.codes[..., 0::2] | (self.codes[..., 1::2] << 4)
        return packed.astype(np.uint8)


def midpoint(bits: int) -> int:
    """The code that stands for 0."""
    return 1 << (bits - 1)


def storable(scale: npt.NDArray[np.floating]) -> Float:
    """Round scales up to half precision where all are normal there, so that two bytes hold each; else to float32.

    Up, so that the largest value of a block is still in range.
    """
    size = np.abs(scale)
    if not ((size >= SMALLEST_HALF) & (size <= LARGEST_HALF)).all():
        return scale.astype(np.float32)
    half = size.astype(np.float16)
    half[half < size] = np.nextafter(half[half < size], np.float16(np.inf))
    signed: Float = np.copysign(half, scale).astype(np.float32)
    return signed


def into_blocks(matrix: npt.NDArray[np.floating], block_size: int) -> npt.NDArray[np.floating]:
    """Pad (rows, columns) with zeros to whole blocks: (rows, blocks, block)."""
    rows, columns = matrix.shape
    padded = np.pad(matrix, ((0, 0), (0, -columns % block_size)))
    return padded.reshape(rows, -1, block_size)


def widest_scale(values: npt.NDArray[np.floating], bits: int) -> npt.NDArray[np.floating]:
    """Return the scale (…) that just covers `values` (…, block), before rounding; 1 for zeros alone.

    8 and 7 bits are symmetric, ±127 and ±63. Of 4 bits all 16 codes are used: the largest magnitude becomes code 0, −8
    times a scale of the other sign.
    """
    if bits > 4:
        scale = np.abs(values).max(axis=-1) / (midpoint(bits) - 1)
    else:
        largest = np.take_along_axis(values, np.abs(values).argmax(axis=-1)[..., None], axis=-1)[..., 0]
        scale = -largest / midpoint(bits)
    return np.where(scale == 0, 1, scale)


def encode(values: npt.NDArray[np.floating], scale: npt.NDArray[np.floating], bits: int) -> npt.NDArray[np.uint8]:
    """Return the nearest codes of `values` (…, block) for `scale` (…)."""
    lowest = 1 if bits > 4 else 0
    levels = np.rint(values / scale[..., None]) + midpoint(bits)
    codes: npt.NDArray[np.uint8] = np.clip(levels, lowest, (1 << bits) - 1).astype(np.uint8)
    return codes


def round_to_nearest(matrix: Float, bits: int, block_size: int, moments: Double | None = None) -> BlockCodes:
    """Cover every block's largest magnitude and round every value to its nearest code; the inputs do not matter."""
    del moments
    blocks = into_blocks(matrix, block_size)
    scale = storable(widest_scale(blocks, bits))
    return BlockCodes(encode(blocks, scale, bits), scale, bits, matrix.shape[1])
