"""Context use: what the whole text before a token is worth beside its last N tokens alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from expe_edge.divergence import Double, ratio_of_sums
from expe_edge.errors import ConfigError
from expe_edge.quality.losses import Panel
from expe_edge.quality.scoring import Ids
from expe_edge.results import Result

#: Targets come in strides of N / 8, and so many strides make the targets of one length.
STRIDES_PER_LENGTH = 4


@dataclass(frozen=True)
class ContextUse(Result):
    """What one model gains from far text, over the same target tokens read twice.

    length: the targets are the last tokens of the first `length` predicted ones. tokens: targets of all documents.
    full_loss: their loss with the whole text before them, nats per token. near_loss: their loss with the last N tokens
    alone. gained: near_loss less full_loss, above zero where far text helps. Standard errors are over documents, and
    that of `gained` is of the paired difference.
    """

    model: str
    length: int
    documents: int
    tokens: int
    full_loss: float
    full_loss_stderr: float
    near_loss: float
    near_loss_stderr: float
    gained: float
    gained_stderr: float


def require_far(lengths: Sequence[int]) -> None:
    """Raise `ConfigError` unless one of `lengths`, in units of N, is beyond N."""
    if max(lengths) < 2:
        raise ConfigError(
            "`lengths` 1: context use is measured from 2 on; add such a length, or choose another `probe`"
        )


def stride(training_length: int) -> int:
    """Return how many targets are read in one pass over the last N tokens."""
    return max(1, training_length // 8)


def near_tokens(lengths: Sequence[int], training_length: int) -> int:
    """Return how many tokens `context_use` reads of each document beside the whole."""
    return sum(length > 1 for length in lengths) * STRIDES_PER_LENGTH * training_length


def context_use(
    panel: Panel,
    documents: Sequence[Ids],
    losses: Double,
    lengths: Sequence[int],
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[ContextUse, ...]:
    """Measure what far text is worth, of every model at every length beyond N.

    The targets of a length are its last N / 2 tokens. Without far text they are read in passes over N tokens, of which
    the last N / 8 are scored: a target sees at least 7/8 of N tokens before it, and no pass is longer than training.

    Args:
        documents: token ids (T,), each at least max(lengths)·N + 1 long.
        losses: of all models and documents, (models, documents, max(lengths)·N); see `document_losses`.
        lengths: in units of N. Those below 2 are left out.
        advance: called with the number of tokens that every model has just scored.
    """
    results = []
    for end in (length * panel.training_length for length in lengths if length > 1):
        begin = end - STRIDES_PER_LENGTH * stride(panel.training_length)
        near = np.stack([_near_losses(panel, document, begin, end, advance) for document in documents], axis=1)
        for name, of_near, of_full in zip(panel.names, near, losses[:, :, begin:end], strict=True):
            results.append(_result(name, end, of_near, of_full))
    return tuple(sorted(results, key=lambda result: panel.names.index(result.model)))


def _near_losses(panel: Panel, document: Ids, begin: int, end: int, advance: Callable[[int], None]) -> Double:
    """Return the losses of tokens [begin + 1, end + 1), each from at most the N tokens before it, (models, t)."""
    width, step = panel.training_length, stride(panel.training_length)
    passes = []
    for last in range(begin + step, end + 1, step):
        window = document[last - width : last + 1]
        passes.append(np.stack([predicted.nll for predicted in panel.score(window, width - step + 1)]))
        advance(width)
    return np.concatenate(passes, axis=1)


def _result(model: str, length: int, near: Double, full: Double) -> ContextUse:
    """Reduce losses (documents, t) with and without far text to one length's figures."""
    counts = np.full(len(near), float(near.shape[1]))
    full_loss, full_error = ratio_of_sums(full.sum(axis=1), counts)
    near_loss, near_error = ratio_of_sums(near.sum(axis=1), counts)
    gained, gained_error = ratio_of_sums((near - full).sum(axis=1), counts)
    return ContextUse(
        model=model,
        length=length,
        documents=len(near),
        tokens=near.size,
        full_loss=full_loss,
        full_loss_stderr=full_error,
        near_loss=near_loss,
        near_loss_stderr=near_error,
        gained=gained,
        gained_stderr=gained_error,
    )
