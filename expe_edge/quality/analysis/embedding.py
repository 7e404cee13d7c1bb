"""What the first l dimensions hold: their size and variance beside the others', and what tokens' neighbours lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from expe_edge.divergence import Double, Float, ratio_of_sums
from expe_edge.quality.scoring import Ids
from expe_edge.results import Result

#: k, neighbours of a token that are looked at; tokens that are shown with theirs.
NEIGHBOURS, EXAMPLES = 10, 6
#: Draws of as many other dimensions, whose loss the first ones' is compared with.
DRAWS = 4
#: Rows of cosines computed at once.
ROWS = 1024


@dataclass(frozen=True)
class Spread(Result):
    """Size and variance of the first l dimensions of some states beside the others'.

    place: `embedding`, the table's rows of tokens that occur; `residual`, the stream that enters `layer`; `normed`, the
    same behind the norm, from which queries, keys and values are made. layer: from 1, 0 of the embedding. dims: l.
    rms: root mean square of a dimension. variance: of a dimension across tokens, mean over dimensions. share: of the
    variance of all dimensions, what lies in the first l. chance: l / C, the mean share of l dimensions drawn at random;
    chance_deviation: the standard deviation of theirs. NaN, null in JSON, is what is of the first where l is 0, and of
    the others where it is C.
    """

    place: str
    layer: int
    dims: int
    rms_first: float
    rms_others: float
    variance_first: float
    variance_others: float
    share: float
    chance: float
    chance_deviation: float


class Moments:
    """Sums over states, by dimension."""

    def __init__(self, width: int) -> None:
        self.count, self.sums, self.squares = 0, np.zeros(width), np.zeros(width)

    def add(self, states: Double) -> None:
        """Take in (T, C)."""
        self.count += len(states)
        self.sums += states.sum(axis=0)
        self.squares += (states**2).sum(axis=0)

    def spread(self, place: str, layer: int, dims: int) -> Spread:
        """Reduce the sums to the figures of the first `dims` dimensions and the others."""
        squares = self.squares / self.count
        variances = squares - (self.sums / self.count) ** 2
        share = variances / variances.sum() if variances.any() else np.full_like(variances, np.nan)
        return Spread(
            place=place,
            layer=layer,
            dims=dims,
            rms_first=float(np.sqrt(_mean(squares[:dims]))),
            rms_others=float(np.sqrt(_mean(squares[dims:]))),
            variance_first=_mean(variances[:dims]),
            variance_others=_mean(variances[dims:]),
            share=float(share[:dims].sum()) if dims else np.nan,
            chance=dims / len(share) if dims else np.nan,
            # Of a sum of values drawn without putting them back (Cochran, Sampling Techniques, 1977, chapter 2).
            chance_deviation=float(np.sqrt(dims * (1 - dims / len(share)) * share.var(ddof=1))) if dims else np.nan,
        )


def _mean(values: Double) -> float:
    return float(values.mean()) if len(values) else np.nan


@dataclass(frozen=True)
class Example:
    """A token and its neighbours' texts, nearest first: by all dimensions, and without the first l."""

    token: str
    by_all: tuple[str, ...]
    without_first: tuple[str, ...]


@dataclass(frozen=True)
class Neighbours(Result):
    """How much of a token's neighbourhood in the embedding table survives without the first l dimensions.

    tokens: those that occur in the text, compared with one another. neighbours: k nearest by cosine. overlap: share of
    a token's k that are still among its k without the first l dimensions. overlap_without_others: the same without as
    many of the other dimensions, drawn at random, mean of `DRAWS` draws; NaN where there are not as many. Standard
    errors are over tokens.
    """

    dims: int
    tokens: int
    neighbours: int
    overlap: float
    overlap_stderr: float
    overlap_without_others: float
    overlap_without_others_stderr: float
    examples: tuple[Example, ...] = ()


def neighbours(table: Float, dims: int, texts: Sequence[str], seed: int, most: int = NEIGHBOURS) -> Neighbours:
    """Compare neighbourhoods with the first `dims` dimensions, 1 at least, and without.

    Args:
        table: embeddings of the tokens that occur, (V, C), at least two.
        texts: of those tokens. seed: of the examples and of the dimensions that are left out in place of the first.
        most: k, lowered to the number of other tokens.
    """
    generator, width = np.random.default_rng(seed), table.shape[1]
    shown = _examples(texts, generator)
    k = min(most, len(table) - 1)
    whole, without = nearest(table, k), nearest(table[:, dims:], k)
    overlap, error = _overlap([whole], [without])
    drawn = []
    if width - dims >= dims:
        left_out = (dims + generator.permutation(width - dims)[:dims] for _ in range(DRAWS))
        drawn = [nearest(np.delete(table, columns, axis=1), k) for columns in left_out]
    others, others_error = _overlap([whole] * len(drawn), drawn)
    return Neighbours(
        dims=dims,
        tokens=len(table),
        neighbours=k,
        overlap=overlap,
        overlap_stderr=error,
        overlap_without_others=others,
        overlap_without_others_stderr=others_error,
        examples=tuple(
            Example(texts[token], *(tuple(texts[i] for i in found[token]) for found in (whole, without)))
            for token in shown
        ),
    )


def nearest(table: Float, count: int) -> Ids:
    """Return for each row of (V, C) the `count` others of the largest cosine, the largest first, (V, count)."""
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    unit = table / np.maximum(norms, np.finfo(table.dtype).tiny)
    parts = []
    for begin in range(0, len(unit), ROWS):
        cosines = unit[begin : begin + ROWS] @ unit.T
        cosines[np.arange(len(cosines)), begin + np.arange(len(cosines))] = -np.inf
        parts.append(np.argsort(-cosines, axis=1, kind="stable")[:, :count])
    return np.concatenate(parts)


def _overlap(before: Sequence[Ids], after: Sequence[Ids]) -> tuple[float, float]:
    """Return the mean share of neighbours (V, k) that are kept, over all pairs, and its standard error over tokens."""
    if not after:
        return np.nan, np.nan
    kept = [(a[:, :, None] == b[:, None, :]).any(axis=2).mean(axis=1) for a, b in zip(before, after, strict=True)]
    return ratio_of_sums(np.mean(kept, axis=0), np.ones(len(before[0])))


def _examples(texts: Sequence[str], generator: np.random.Generator) -> list[int]:
    """Draw tokens that a reader knows, three letters at least; any where there are none."""
    words = [place for place, text in enumerate(texts) if text.strip().isalpha() and len(text.strip()) > 2]
    return sorted(generator.permutation(words or len(texts))[:EXAMPLES].tolist())
