"""Log probabilities of what was chosen, and of what could have been."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from expe_edge.divergence import Double, log_softmax
from expe_edge.runtime.filters import Scores, top_indices

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Alternative:
    """A token in one place. text: its own, U+FFFD for part of a character. logprob: in nats."""

    token: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprobs(Alternative):
    """The token that was chosen, and the likeliest ones, best first, which need not hold it.

    Log probabilities are the model's own, of its logits as they are: no temperature, filter, penalty, bias or
    constraint is in them.
    """

    top: tuple[Alternative, ...] = ()


def token_logprobs(tokenizer: Tokenizer, logits: Scores, token: int, count: int) -> TokenLogprobs:
    """Return those of `token` and of the `count` likeliest tokens by `logits` (V,); equal ones by their ids."""
    logprobs = log_softmax(logits)
    best = top_indices(logits, count) if count else np.empty(0, dtype=np.int64)
    best = best[np.argsort(-logits[best], kind="stable")][:count]
    top = tuple(Alternative(*_described(tokenizer, logprobs, int(each))) for each in best)
    return TokenLogprobs(*_described(tokenizer, logprobs, token), top=top)


def _described(tokenizer: Tokenizer, logprobs: Double, token: int) -> tuple[int, str, float]:
    return token, str(tokenizer.decode([token], skip_special_tokens=False)), float(logprobs[token])
