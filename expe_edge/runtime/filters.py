"""Which tokens sampling leaves in: temperature, top-k, top-p, min-p and typical sampling, as transformers' warpers.

A decode step of a small model takes two milliseconds, so arrays as long as the vocabulary are gone through as seldom
as can be, and nothing is sorted but the few tokens that can be drawn.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from expe_edge.errors import GenerationError

if TYPE_CHECKING:
    from expe_edge.runtime.sampling import Sampling

Ids = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]
#: Nats below the best score that all lower ones are taken to have: one of 32,000 such would be in 300 million draws.
NEVER = 30.0
#: Temperatures beyond act as these: greedy but for equal tokens, and all as likely.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-36, 1e36
#: Into how many ranges of distance tokens are put to find those nearest to the entropy.
BINS = 1024
#: Of how many tokens a draw first looks among the likely ones alone, and the probability that all others share at most.
MANY, RARE = 512, 0.01


def left_in(logits: Scores, sampling: Sampling) -> tuple[Ids | None, Scores]:
    """Return the ids (n,) of the tokens that temperature and filters leave in of `logits` (V,); None for all.

    Also their probabilities (n,) but for a common factor.

    Raises:
        GenerationError: logits that are not finite.
    """
    ids = None
    if 0 < sampling.top_k < len(logits):
        ids = top_indices(logits, sampling.top_k)
        logits = logits[ids]
    weights = likelihoods(logits, sampling.temperature)
    if sampling.top_p < 1:
        ids, weights = _taken(ids, weights, nucleus_indices(weights, sampling.top_p))
    if sampling.min_p > 0:
        ids, weights = _taken(ids, weights, (weights >= np.float32(sampling.min_p)).nonzero()[0])
    if sampling.typical_p < 1:
        ids, weights = _taken(ids, weights, typical_indices(weights, sampling.typical_p))
    return ids, weights


def _taken(ids: Ids | None, weights: Scores, indices: Ids) -> tuple[Ids, Scores]:
    return indices if ids is None else ids[indices], weights[indices]


def likelihoods(logits: Scores, temperature: float) -> Scores:
    """Return the probabilities of `logits` (n,) at a temperature above 0, but for a factor: 1 is the likeliest token's.

    Raises:
        GenerationError: logits that are not finite.
    """
    best = logits.max()
    if not math.isfinite(best):
        raise GenerationError("the model's logits are not finite; its weights or its export are damaged")
    temperature = min(max(temperature, LEAST_TEMPERATURE), MOST_TEMPERATURE)
    scores: Scores = logits - best
    np.maximum(scores, np.float32(-NEVER * temperature), out=scores)  # so that none leaves float32
    scores /= np.float32(temperature)
    return np.exp(scores, out=scores)


def top_indices(scores: Scores, count: int) -> Ids:
    """Return the indices, in order, of the `count` best of `scores` (n,), and of all equal to the last of them.

    The maxima of 4 · count columns are cheap, and `count` scores at least are not below the count-th of these.
    """
    columns = 4 * count
    rows = len(scores) // columns
    if rows < 2:
        return (scores >= largest(scores, count)).nonzero()[0]
    maxima = scores[: rows * columns].reshape(rows, columns).max(axis=0)
    candidates: Ids = (scores >= largest(maxima, count)).nonzero()[0]
    few = scores[candidates]
    best: Ids = candidates[few >= largest(few, count)]
    return best


def largest(scores: Scores, count: int) -> np.float32:
    """Return the count-th largest of `scores` (n,)."""
    parted = scores.copy()
    parted.partition(len(scores) - count)
    found: np.float32 = parted[len(scores) - count]
    return found


def nucleus_indices(weights: Scores, top_p: float) -> Ids:
    """Return the indices of the fewest best `weights` (n,), probabilities but for a factor, that make `top_p` of all.

    Those below (1 − p)/n of all, whose sum is less than 1 − p, are not looked at.
    """
    total = float(weights.sum(dtype=np.float64))
    candidates: Ids = (weights >= np.float32((1 - top_p) * total / len(weights))).nonzero()[0]
    few = weights[candidates]
    best = few.copy()
    best.sort()
    reached = best[::-1].cumsum(dtype=np.float64)
    last = min(int(reached.searchsorted(top_p * total)), len(best) - 1)
    kept: Ids = candidates[few >= best[-1 - last]]
    return kept


def typical_indices(weights: Scores, typical_p: float) -> Ids:
    """Return the indices of the fewest of `weights` (n,), nearest to the entropy, that make `typical_p` of all.

    How far a token is from typical is |−log p − H|, H the entropy of the distribution (Meister et al., Locally Typical
    Sampling, 2022).
    """
    probabilities = weights.astype(np.float64)
    probabilities /= probabilities.sum()
    logs = np.log(probabilities)
    distance = np.abs(logs - probabilities @ logs)
    bins = (distance * (BINS / (float(distance.max()) or 1.0))).astype(np.int64)  # all but one need not be sorted
    masses = np.bincount(bins, weights=probabilities)
    reached = masses.cumsum()
    crossed = min(int(reached.searchsorted(typical_p)), len(masses) - 1)
    inside = (bins == crossed).nonzero()[0]
    inside = inside[distance[inside].argsort()]
    within = float(reached[crossed] - masses[crossed]) + probabilities[inside].cumsum()
    last = inside[min(int(within.searchsorted(typical_p)), len(inside) - 1)]
    kept: Ids = (distance <= distance[last]).nonzero()[0]
    return kept


def draw(weights: npt.NDArray[Any], random: np.random.Generator) -> int:
    """Return an index drawn by `weights` (n,), which need not add up to 1.

    Of many, the likely ones are gone through first and the others where the draw falls beyond, which is seldom.
    """
    at = random.random()
    if len(weights) < MANY:
        reached = weights.cumsum(dtype=np.float64)
        return int(reached.searchsorted(at * reached[-1], side="right"))
    total = float(weights.sum(dtype=np.float64))
    is_likely = weights >= np.float32(RARE * total / len(weights))
    likely = is_likely.nonzero()[0]
    reached = weights[likely].cumsum(dtype=np.float64)
    beyond = at * total - float(reached[-1])
    if beyond >= 0:
        likely = (~is_likely).nonzero()[0]
        reached = weights[likely].cumsum(dtype=np.float64)
    index = reached.searchsorted(beyond if beyond >= 0 else at * total, side="right")
    return int(likely[min(int(index), len(likely) - 1)])
