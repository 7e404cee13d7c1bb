"""The decode loop: rows that are prefilled one by one and decoded together, and the stream of one row's text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from expe_edge.runtime.cache import Cache
from expe_edge.runtime.sampling import Sampler
from expe_edge.runtime.session import Ids, Logits, PackageSession, Step
from expe_edge.runtime.streaming import TextStream


@dataclass
class Completion:
    """What was generated for one prompt.

    Attributes:
        text: the new text, without the prompt. tokens: the new ids, the closing end-of-text included.
        finish_reason: `length`, `end_of_text` or `stop`; None until the text is complete.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    finish_reason: str | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class Row:
    """One sequence being generated: its sampler, its text, its completion.

    ids: of the prompt, (T,) int64. end_of_text: the id that ends the sequence, or None.
    """

    def __init__(
        self, ids: Ids, sampler: Sampler, text: TextStream, *, max_new_tokens: int, end_of_text: int | None
    ) -> None:
        self.ids, self.sampler, self.text = ids, sampler, text
        self.max_new_tokens, self.end_of_text = max_new_tokens, end_of_text
        self.completion = Completion(prompt_tokens=len(ids))

    @property
    def finish_reason(self) -> str | None:
        """Why no token follows the last; None where one does."""
        tokens = self.completion.tokens
        if self.text.stopped:
            return "stop"
        if tokens[-1:] == [self.end_of_text]:
            return "end_of_text"
        return "length" if len(tokens) >= self.max_new_tokens else None

    def accept(self, logits: Logits) -> str:
        """Choose the next token from `logits` (V,); return the text that is now certain."""
        token = self.sampler.choose(logits)
        self.completion.tokens.append(token)
        piece = self.text.push(token)
        self.completion.text += piece
        return piece

    def finish(self) -> str:
        """Note why the sequence ended; return the text held back to the end."""
        self.completion.finish_reason = self.finish_reason
        piece = self.text.finish()
        self.completion.text += piece
        return piece


class Stream(Iterator[str]):
    """The text that follows a prompt, piece by piece, never part of a character. Asking for a piece decodes it.

    steps: `decode` of one row.

    Attributes:
        completion: what has been generated so far; complete once iteration has ended.
    """

    def __init__(self, steps: Iterator[list[str]], completion: Completion) -> None:
        self.completion = completion
        self._pieces = (piece for (piece,) in steps if piece)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Decode no further and free the cache; the completion stays as it is."""
        self._pieces.close()


def decode(session: PackageSession, rows: Sequence[Row], cache: Cache, prefill_chunk: int) -> Iterator[list[str]]:
    """Complete all `rows` in an empty cache of as many; yield what a step adds to each row's text, if anything.

    The first step prefills, the last gives the text held back; between, every step is one run for all rows.
    """
    yield [row.accept(_prefill(session, row, cache.row(index), prefill_chunk)) for index, row in enumerate(rows)]
    step, began = Step(session, cache, 1), time.perf_counter()
    while any(row.finish_reason is None for row in rows):
        logits = step.run(np.array([[row.completion.tokens[-1]] for row in rows], dtype=np.int64))
        pieces = [""] * len(rows)
        for index, row in enumerate(rows):
            if row.finish_reason is None:
                pieces[index] = row.accept(logits[index, -1])
                row.completion.decode_seconds = time.perf_counter() - began
        yield pieces
    yield [row.finish() for row in rows]


def _prefill(session: PackageSession, row: Row, cache: Cache, chunk: int) -> Logits:
    """Fill a cache of one row with the row's prompt; return the last token's logits (V,)."""
    began = time.perf_counter()
    for logits in session.prefill(cache, row.ids, chunk):
        last: Logits = logits[-1]  # one chunk's logits at a time: all of them could fill memory
    row.completion.prefill_seconds = time.perf_counter() - began
    return last
