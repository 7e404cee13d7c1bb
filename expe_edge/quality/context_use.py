"""Context use: what the whole text before a token is worth beside its last tokens alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from expe_edge.divergence import Double, ratio_of_sums
from expe_edge.errors import ConfigError
from expe_edge.quality.losses import Panel
from expe_edge.quality.scoring import Ids
from expe_edge.results import Result

#: Targets come in strides of N / 8, and so many strides, of N tokens at most, make the targets of one length.
STRIDES_PER_LENGTH = 4


@dataclass(frozen=True)
class ContextUse(Result):
    """What one model gains from far text, over the same target tokens read twice.

    length: the targets are the last tokens of the first `length` predicted ones. near: tokens of near text, at most.
    tokens: targets of all documents. full_loss: their loss with the whole text before them, nats per token. near_loss:
    their loss with the last `near` tokens alone. gained: near_loss less full_loss, above zero where far text helps.
    Standard errors are over documents, and that of `gained` is of the paired difference.
    """

    model: str
    length: int
    near: int
    documents: int
    tokens: int
    full_loss: float
    full_loss_stderr: float
    near_loss: float
    near_loss_stderr: float
    gained: float
    gained_stderr: float


def require_far(lengths: Sequence[int], near: int) -> None:
    """Raise `ConfigError` unless near text has a length and one of `lengths` is beyond it, all in units of N."""
    if near < 1:
        raise ConfigError(f"`near` is {near}; at least 1")
    if max(lengths) <= near:
        raise ConfigError(
            f"`lengths` end at {max(lengths)}: context use is measured beyond {near}, as `near` says; "
            "add such a length, or choose another `probe`"
        )


def stride(training_length: int) -> int:
    """Return how many targets are read in one pass over near text."""
    return max(1, training_length // 8)


def strides(training_length: int) -> int:
    """Return how many strides make the targets of one length: `STRIDES_PER_LENGTH`, but fewer where N is below it."""
    return min(STRIDES_PER_LENGTH, training_length)


def near_tokens(lengths: Sequence[int], near: int, training_length: int) -> int:
    """Return how many tokens `context_use` reads of each document beside the whole."""
    return sum(length > near for length in lengths) * strides(training_length) * near * training_length


def context_use(
    panel: Panel,
    documents: Sequence[Ids],
    losses: Double,
    lengths: Sequence[int],
    near: int = 1,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[ContextUse, ...]:
    """Measure what far text is worth, of every model at every length beyond near text.

    The targets of a length are its last N / 2 tokens. Without far text they are read in passes over `near`·N tokens, of
    which the last N / 8 are scored, so that all of them see more than `near`·N − N / 8 tokens. By default no pass is
    longer than training; with 2, what is lost by reading on from twice that length is a gain below zero.

    Args:
        documents: token ids (T,), each at least max(lengths)·N + 1 long.
        losses: of all models and documents, (models, documents, max(lengths)·N); see `document_losses`.
        lengths: in units of N. Those that near text covers are left out.
        near: tokens of near text, in units of N.
        advance: called with the number of tokens that every model has just scored.
    """
    results = []
    width = near * panel.training_length
    for end in (length * panel.training_length for length in lengths if length > near):
        begin = end - strides(panel.training_length) * stride(panel.training_length)
        alone = np.stack([_near_losses(panel, document, begin, end, width, advance) for document in documents], axis=1)
        for name, of_near, of_full in zip(panel.names, alone, losses[:, :, begin:end], strict=True):
            results.append(_result(name, end, width, of_near, of_full))
    return tuple(sorted(results, key=lambda result: panel.names.index(result.model)))


def _near_losses(
    panel: Panel, document: Ids, begin: int, end: int, width: int, advance: Callable[[int], None]
) -> Double:
    """Return the losses of tokens [begin + 1, end + 1), each from at most `width` tokens before it, (models, t)."""
    step, passes = stride(panel.training_length), []
    for last in range(begin + step, end + 1, step):
        window = document[last - width : last + 1]
        passes.append(np.stack([predicted.nll for predicted in panel.score(window, width - step + 1)]))
        advance(width)
    return np.concatenate(passes, axis=1)


def _result(model: str, length: int, width: int, near: Double, full: Double) -> ContextUse:
    """Reduce losses (documents, t) with and without far text to one length's figures."""
    counts = np.full(len(near), float(near.shape[1]))
    full_loss, full_error = ratio_of_sums(full.sum(axis=1), counts)
    near_loss, near_error = ratio_of_sums(near.sum(axis=1), counts)
    gained, gained_error = ratio_of_sums((near - full).sum(axis=1), counts)
    return ContextUse(
        model=model,
        length=length,
        near=width,
        documents=len(near),
        tokens=near.size,
        full_loss=full_loss,
        full_loss_stderr=full_error,
        near_loss=near_loss,
        near_loss_stderr=near_error,
        gained=gained,
        gained_stderr=gained_error,
    )
