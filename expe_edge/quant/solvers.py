"""How a matrix gets its codes: rounding to the nearest, or GPTQ, which rounds with the inputs in view.

What GPTQ leaves is refined: both minimise the output's squared error tr(E·M·Eᵀ), E = Ŵ − W, M the inputs' moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from expe_edge.errors import ExportError
from expe_edge.quant.blocks import (
    BLOCK_SIZE,
    BlockCodes,
    Double,
    Float,
    encode,
    into_blocks,
    midpoint,
    round_to_nearest,
    storable,
    widest_scale,
)

#: What is added to the diagonal of the inputs' second moments, in units of its mean (the paper's value).
DAMPING = 0.01
#: How far the widest scale is shrunk in search of the least weighted error.
SHRINKAGE = np.linspace(1.0, 0.6, 17)
#: Most columns that are rounded before what they do to all later ones is worked out.
CHUNK = 128
#: Rounds of refinement: later ones gain less than a hundredth.
REFINEMENTS = 3
#: How far a round may take a scale, as a factor.
NARROWEST, WIDEST = 0.5, 2.0


def refined_gptq(matrix: Float, bits: int, block_size: int, moments: Double | None) -> BlockCodes:
    """Solve by GPTQ, then refit all scales of a row together and choose each code again with all others known."""
    assert moments is not None
    solved, moments = gptq(matrix, bits, block_size, moments), _damped(moments)
    for _ in range(REFINEMENTS):
        solved = descend(matrix, refit_scales(matrix, solved, moments), moments)
    return solved


def refit_scales(matrix: Float, solved: BlockCodes, moments: Double) -> BlockCodes:
    """Return the codes with the scales of least output error: linear least squares in the blocks of each row.

    A row keeps the scales it has where storing the new ones in half precision would lose more than they gain.
    """
    levels = _levels(solved)
    rows, blocks = solved.scale.shape
    target: Double = matrix.astype(np.float64) @ moments
    left = np.empty((rows, blocks, blocks))
    right = np.empty((rows, blocks, 1))
    starts = range(0, solved.columns, solved.block_size)
    for index, begin in enumerate(starts):
        block = slice(begin, begin + solved.block_size)
        left[:, index] = np.add.reduceat(levels[:, block] @ moments[block] * levels, starts, axis=1)
        right[:, index, 0] = (levels[:, block] * target[:, block]).sum(axis=1)
    left += np.eye(blocks) * np.finfo(np.float32).tiny  # blocks of zeros alone
    solution = np.linalg.solve(left, right)[..., 0]
    change = solution / solved.scale
    near = (change >= NARROWEST) & (change <= WIDEST)
    refitted = storable(np.where(near, solution, solved.scale))
    slope = left @ (refitted + solved.scale)[..., None] - 2 * right  # of the error, on the way to the new scales
    change_of_error = ((refitted - solved.scale) * slope[..., 0]).sum(axis=1, keepdims=True)
    return solved._replace(scale=np.where(change_of_error < 0, refitted, solved.scale))


def descend(matrix: Float, solved: BlockCodes, moments: Double) -> BlockCodes:
    """Return the scales with codes chosen again, column by column, each the best with all others as they are."""
    levels, scales = _levels(solved), np.repeat(solved.scale, solved.block_size, axis=1)[:, : solved.columns]
    gradient = (levels * scales - matrix) @ moments
    codes = solved.codes.copy()
    flat = codes.reshape(len(codes), -1)
    for begin, end in chunks(solved.columns, solved.block_size):
        block = slice(begin, end)
        within, before = moments[block, block], levels[:, block].copy()
        for column, at in enumerate(range(begin, end)):
            best = levels[:, at] - gradient[:, at] / (within[column, column] * scales[:, at])
            flat[:, at] = encode(best[:, None], np.ones(len(best)), solved.bits)[:, 0]
            chosen = flat[:, at] - float(midpoint(solved.bits))
            gradient[:, block] += np.outer((chosen - levels[:, at]) * scales[:, at], within[column])
            levels[:, at] = chosen
        changes = (levels[:, block] - before) * scales[:, block]
        gradient[:, end:] += changes @ moments[block, end:]
    return solved._replace(codes=codes)


def chunks(columns: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of runs of columns within whole blocks, few enough that work within a run stays in cache."""
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        for begin in range(start, stop, CHUNK):
            yield begin, min(begin + CHUNK, stop)


def _levels(solved: BlockCodes) -> Double:
    """Return the codes around 0, (rows, columns)."""
    codes = solved.codes.reshape(len(solved.codes), -1)[:, : solved.columns]
    return codes.astype(np.float64) - midpoint(solved.bits)


def gptq(matrix: Float, bits: int, block_size: int, moments: Double | None) -> BlockCodes:
    """Round column by column, each error made good by the columns still to come (Frantar et al., arXiv 2210.17323).

    A block's scale is chosen when its first column is reached, to the least error weighted by the inputs' power.
    """
    assert moments is not None
    rows, columns = matrix.shape
    power = np.diag(moments)
    remaining: Double = into_blocks(matrix, block_size).reshape(rows, -1).astype(np.float64)
    padding = remaining.shape[1] - columns
    inverse = np.pad(_inverse_root(moments), ((0, padding), (0, padding)))
    inverse[range(columns, columns + padding), range(columns, columns + padding)] = 1
    weights = np.pad(power, (0, padding))
    codes = np.empty((rows, remaining.shape[1] // block_size, block_size), dtype=np.uint8)
    scales = np.empty(codes.shape[:2], dtype=np.float32)
    flat = codes.reshape(rows, -1)
    for begin, end in chunks(remaining.shape[1], block_size):
        index = begin // block_size
        if begin % block_size == 0:
            block = slice(begin, begin + block_size)
            scales[:, index] = _fitted_scale(remaining[:, block], weights[block], bits)
        scale, chunk = scales[:, index], remaining[:, begin:end]
        errors = np.empty_like(chunk)
        for column, at in enumerate(range(begin, end)):
            flat[:, at] = encode(chunk[:, column, None], scale, bits)[:, 0]
            restored = (flat[:, at].astype(np.float64) - midpoint(bits)) * scale
            errors[:, column] = (chunk[:, column] - restored) / inverse[at, at]
            chunk[:, column + 1 :] -= np.outer(errors[:, column], inverse[at, at + 1 : end])
        remaining[:, end:] -= errors @ inverse[begin:end, end:]
    return BlockCodes(codes, scales, bits, columns)


def _inverse_root(moments: Double) -> Double:
    """Return the upper Cholesky factor of the damped moments' inverse."""
    root: Double = np.linalg.cholesky(np.linalg.inv(_damped(moments))).T
    return root


def _damped(moments: Double) -> Double:
    """Return the moments with something added to the diagonal, so that they have an inverse."""
    damped: Double = moments + np.eye(len(moments)) * (DAMPING * np.diag(moments).mean() or 1.0)
    return damped


def _fitted_scale(values: Double, weights: Double, bits: int) -> Float:
    """Return the scale (rows,) of `values` (rows, block) with the least squared error, weighted by column."""
    widest = widest_scale(values, bits)
    fitted, least = storable(widest), np.full(len(values), np.inf)
    for shrunk in SHRINKAGE:  # one at a time: a block may be as long as the row, and the rows a vocabulary
        scale = storable(widest * shrunk)
        restored = (encode(values, scale, bits).astype(np.float64) - midpoint(bits)) * scale[:, None]
        error = (restored - values) ** 2 @ weights
        fitted, least = np.where(error < least, scale, fitted), np.minimum(error, least)
    return fitted


#: `--solver` to what turns a matrix (rows, columns) into codes: matrix, bits, block size, and the inputs' moments, the
#: mean of x·xᵀ, (columns, columns), or None.
SOLVERS: dict[str, Callable[[Float, int, int, Double | None], BlockCodes]] = {
    "rtn": round_to_nearest,
    "gptq": refined_gptq,
}
#: Solvers that need the moments of the inputs.
MOMENT_SOLVERS = ("gptq",)


@dataclass
class WeightQuantizer:
    """Quantizes the weights of one model, each once however often it is asked.

    block_size: None for the default of each width. moments: by linear, what calibration measured; empty where the
        solver needs none.
    """

    solver: str = "rtn"
    block_size: int | None = None
    moments: Mapping[str, Double] = field(default_factory=dict)
    _done: dict[tuple[str, int, int], BlockCodes] = field(default_factory=dict, repr=False)

    def quantize(self, linear: str, weight: Float, bits: int, block_size: int | None = None) -> BlockCodes:
        """Return codes of the transpose of `weight` (C_in, C_out). block_size: a format's own."""
        block_size = block_size or self.block_size or BLOCK_SIZE[bits]
        key = linear, bits, block_size
        if key not in self._done:
            needed = self.solver in MOMENT_SOLVERS
            if needed and linear not in self.moments:
                raise ExportError(f"calibration measured no inputs of {linear!r}; use `solver` rtn")
            moments = self.moments[linear] if needed else None
            self._done[key] = SOLVERS[self.solver](weight.T, bits, block_size, moments)
        return self._done[key]
