"""Scorers whose figures are known beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from expe_edge.quality.scoring import Scorer
from expe_edge.runtime.memory import PREFILL_CHUNK

#: What an oracle that knows the next token leaves to all others together.
DOUBT = 1e-3
#: Tokens of a match beyond which it is no better.
LONGEST = 8


class Oracle(Scorer):
    """Looks up what followed the same tokens before, among the last `window` tokens that it sees.

    It takes the longest match, of `shortest` tokens at least and with all beyond `LONGEST` as good as that; of equally
    long ones the first or the last. Without a match every token is as likely. `window` 0 knows nothing, None sees
    everything.
    """

    training_length = 32

    def __init__(
        self, path: Path, vocabulary: int, window: int | None = None, *, shortest: int = 4, first: bool = False
    ) -> None:
        self.path, self.vocabulary, self.window = path, vocabulary, window
        self.shortest, self.first = shortest, first
        self.corpus: dict[str, Any] = {}

    def logits(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        rows = np.zeros((len(tokens), self.vocabulary), dtype=np.float32)
        matches = np.zeros(len(tokens), dtype=np.int64)  # common suffix of the text up to p and up to each j < p
        for p, token in enumerate(tokens):
            matches[1:p] = matches[: max(p - 1, 0)]
            matches[:1] = 0
            matches[:p] = np.where(tokens[:p] == token, matches[:p] + 1, 0)
            answer = self._answer(tokens, matches, p)
            if answer is not None:
                rows[p] = np.log(DOUBT / (self.vocabulary - 1))
                rows[p, answer] = np.log(1 - DOUBT)
        yield from (rows[begin : begin + PREFILL_CHUNK] for begin in range(0, len(tokens), PREFILL_CHUNK))

    def _answer(self, tokens: np.ndarray, matches: np.ndarray, p: int) -> int | None:
        oldest = 0 if self.window is None else max(0, p + 1 - self.window)
        visible = np.minimum(np.minimum(matches[:p], LONGEST), np.arange(p) - oldest + 1)
        if self.window == 0 or not len(visible) or visible.max() < self.shortest:
            return None
        (longest,) = np.nonzero(visible == visible.max())
        return int(tokens[longest[0 if self.first else -1] + 1])


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, and text from its ids; ids that it does not have are left out."""

    tokenizer: Any
    size: int

    def text(self, ids: np.ndarray) -> str:
        return str(self.tokenizer.decode([int(i) for i in ids if i < self.size], skip_special_tokens=False))


def tokenizer_of(tokenizer: Any) -> Tokenizer:
    return Tokenizer(tokenizer, tokenizer.get_vocab_size())
