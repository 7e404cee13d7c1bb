"""Measures of how far one model's predictions are from another's, and of how sure the figures are. NumPy only."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]


def log_softmax(logits: Float) -> Double:
    """Return log probabilities of `logits` (…, V), float64."""
    shifted: Double = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normalizer: Double = np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted - normalizer


def divergence(reference: Float, other: Float) -> Double:
    """Return KL(reference ‖ other) for logits (…, V), in nats, (…)."""
    return log_divergence(log_softmax(reference), log_softmax(other))


def log_divergence(expected: Double, actual: Double) -> Double:
    """Return KL(expected ‖ found) for log probabilities (…, V), in nats, (…)."""
    total: Double = (np.exp(expected) * (expected - actual)).sum(axis=-1)
    return total


def ratio_of_sums(sums: Double, counts: Double) -> tuple[float, float]:
    """Return Σ sums / Σ counts and its standard error, documents being the independent units.

    Tokens of one document are not independent, so the error is that of a ratio estimator over documents (Cochran,
    Sampling Techniques, 1977, chapter 6). NaN where there is nothing, or one document alone, to judge by.

    Args:
        sums, counts: one value for each document, (documents,).
    """
    total = counts.sum()
    if total == 0:
        return math.nan, math.nan
    mean = float(sums.sum() / total)
    units = np.count_nonzero(counts)
    if units < 2:
        return mean, math.nan
    residuals = sums - mean * counts
    return mean, float(math.sqrt((residuals**2).sum() * units / (units - 1)) / total)
