"""What is added to scores and taken from them before a token is chosen: bias, and penalties of tokens already seen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from expe_edge.errors import GenerationError

if TYPE_CHECKING:
    from expe_edge.runtime.sampling import Sampling

Scores = npt.NDArray[np.float32]
#: Repetition penalties beyond act as these, so that no penalized score leaves float32.
LEAST_PENALTY, MOST_PENALTY = 1e-30, 1e30
#: The same for what is added: more than any logit of a model.
MOST_ADDED = 1e6


class Penalties:
    """The scores of one sequence: its bias, and what its tokens so far take from them.

    Raises:
        GenerationError: a bias of a token outside the vocabulary.
    """

    def __init__(self, sampling: Sampling, prompt: npt.NDArray[np.int64], vocab_size: int) -> None:
        self.sampling = sampling
        require_known("logit_bias", sampling.logit_bias, vocab_size)
        self.biased = np.array(list(sampling.logit_bias), dtype=np.int64)
        self.bias = np.array([bounded(bias) for bias in sampling.logit_bias.values()], dtype=np.float32)
        self.seen = np.zeros(vocab_size, dtype=np.bool_)
        self.seen[prompt] = True
        self.seen_ids = np.zeros(vocab_size, dtype=np.int64)  # of which the first `seen_count` are meant
        self.seen_count = int(self.seen.sum())
        self.seen_ids[: self.seen_count] = np.flatnonzero(self.seen)
        self.counts: dict[int, int] = {}
        self.lowered = np.zeros(vocab_size, dtype=np.float32)

    def apply(self, logits: Scores) -> Scores:
        """Return the scores of `logits` (V,), which stay as they are: bias, repetition, frequency and presence."""
        repetition = self.sampling.repetition_penalty != 1
        if len(self.biased) or repetition:
            logits = logits.copy()
        if len(self.biased):
            logits[self.biased] += self.bias
        if repetition:
            seen = self.seen_ids[: self.seen_count]
            logits[seen] = penalized(logits[seen], self.sampling.repetition_penalty)
        return logits - self.lowered if self.sampling.counts_tokens else logits

    def note(self, token: int) -> None:
        """Remember a generated token."""
        if not self.seen[token]:
            self.seen[token] = True
            self.seen_ids[self.seen_count] = token
            self.seen_count += 1
        if self.sampling.counts_tokens:
            count = self.counts[token] = self.counts.get(token, 0) + 1
            self.lowered[token] = bounded(count * self.sampling.frequency_penalty + self.sampling.presence_penalty)


def penalized(logits: Scores, penalty: float) -> Scores:
    """Return the lowered scores of tokens that have been seen, for their `logits` (n,)."""
    penalty = min(max(penalty, LEAST_PENALTY), MOST_PENALTY)
    return np.where(logits > 0, logits / penalty, logits * penalty)


def bounded(added: float) -> float:
    """Return what is added to a score, within `MOST_ADDED`."""
    return min(max(added, -MOST_ADDED), MOST_ADDED)


def require_known(setting: str, tokens: Iterable[int], vocab_size: int) -> None:
    """Raise `GenerationError` where one of `tokens`, which `setting` names, is outside the vocabulary."""
    outside = [token for token in tokens if not 0 <= token < vocab_size]
    if outside:
        raise GenerationError(f"`{setting}`: token id {outside[0]} is outside the vocabulary of {vocab_size}")
