"""Continuous batching: rows that decode together, and join and leave while others go on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from expe_edge.errors import GenerationError
from expe_edge.runtime.cache import Cache
from expe_edge.runtime.context import Context
from expe_edge.runtime.decoding import Row
from expe_edge.runtime.prefixes import Prefixes
from expe_edge.runtime.session import Ids, Logits, PackageSession, Step


@dataclass
class Reading:
    """A row whose prompt is being read. rest: what is still to be read, (T,)."""

    row: Row
    rest: Ids


class Batch:
    """Rows that decode together. Whoever drives it adds rows and calls `step`, in one thread, until it is idle.

    Rows may be added and removed between any two steps. Prompts are read one after another, one chunk for each step of
    the rows that decode, so that no prompt makes them wait for long. Rows that decode stand first in the cache; when
    one leaves, the last takes its place. An error of one row, which its `failure` then is, ends that row alone.

    Args:
        cache: its rows are the most that run at once. prefill_chunk: as of `PackageSession.prefill`.
        together: whether a step runs all rows at once, or one after another, which gives each the bits that it gets
            alone where rows of one run share something: with int8-dynamic their activations' range.
        prefixes: what was read of prompts before, in pieces of `prefill_chunk` tokens; None to read all.
    """

    def __init__(
        self,
        session: PackageSession,
        cache: Cache,
        prefill_chunk: int | None = None,
        *,
        together: bool = True,
        prefixes: Prefixes | None = None,
    ) -> None:
        self.session, self.cache, self.prefill_chunk = session, cache, prefill_chunk
        self.together, self.prefixes = together, prefixes
        self.waiting: deque[Row] = deque()
        self.reading: Reading | None = None
        self.decoding: list[Row] = []
        self._steps: dict[tuple[int, int, int], Step] = {}

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.reading or self.decoding)

    def add(self, row: Row) -> None:
        """Let a row join as soon as there is a place for it."""
        self.waiting.append(row)

    def remove(self, row: Row) -> None:
        """Let a row leave before its end; its completion stays as it is."""
        if row in self.waiting:
            self.waiting.remove(row)
        elif self.reading is not None and self.reading.row is row:
            self.reading = None
        elif row in self.decoding:
            self._leave(self.decoding.index(row))

    def step(self) -> list[tuple[Row, str]]:
        """Decode a token of every row that decodes, and read a chunk of the next prompt; return what texts gain.

        The last piece of a row has what was held back to its end; its `completion.finish_reason` is set then. A row
        that has failed is among them, without a piece.

        Raises:
            PackageError: onnxruntime cannot run the graph. GenerationError: memory has no room.
        """
        gained = self._decode() if self.decoding else []
        return gained + self._read()

    def _read(self) -> list[tuple[Row, str]]:
        """Read the next chunk of the prompt that is being read, or the first of the next one."""
        place = len(self.decoding)
        if self.reading is None:
            if not self.waiting or place == self.cache.batch:
                return []
            self.reading = self._admit(self.waiting.popleft(), self.cache.row(place))
        row, began = self.reading.row, time.perf_counter()
        logits = self._read_chunk(self.reading, self.cache.row(place))
        row.completion.prefill_seconds += time.perf_counter() - began
        row.has_read(len(self.reading.rest))
        if len(self.reading.rest):
            return []
        self.reading = None
        if self.prefixes is not None:
            self.prefixes.keep(self.cache.row(place), row.ids)
        self.decoding.append(row)
        row.began = time.perf_counter()
        return self._settled({row: _accepted(row, logits)})

    def _read_chunk(self, reading: Reading, cache: Cache) -> Logits:
        """Read the next chunk of a prompt; return the logits of its last token (V,).

        Where those of all its tokens are wanted too, it is read once more for them: what else is computed beside the
        last token's logits may change their bits.
        """
        before, rest = cache.read, reading.rest
        if reading.row.completion.prompt_logprobs is not None:
            reading.row.score(before, next(self.session.prefill(cache, rest, self.prefill_chunk)))
            cache.truncate(before)
        logits = next(self.session.prefill(cache, rest, self.prefill_chunk, last=True))
        reading.rest = rest[cache.read - before :]
        last: Logits = logits[-1]
        return last

    def _admit(self, row: Row, place: Cache) -> Reading:
        """Give a row its place in the cache, with what was read of its prompt before."""
        if row.prefix is not self.cache:
            place.clear()
            place.begin_with(row.prefix, row.ids)
        if self.prefixes is not None and row.prefix is None and row.completion.prompt_logprobs is None:
            self.prefixes.fill(place, row.ids)
        rest = place.last() if row.goes_on else place.reuse(row.ids)
        row.completion.reused_tokens = row.completion.prompt_tokens - len(rest)
        place.reserve(int(place.lengths[0]) + len(rest))
        return Reading(row, rest)

    def _decode(self) -> list[tuple[Row, str]]:
        if len(self.decoding) == 1 and self.decoding[0].lookup is not None:
            gained = {self.decoding[0]: self._verify(self.decoding[0])}
        else:
            gained = {}
            for begin, end in self._runs():
                rows = self.decoding[begin:end]
                last = np.array([row.completion.tokens[-1:] for row in rows], dtype=np.int64)
                logits = self._step(begin, end, 1).run(last)
                gained |= {row: _accepted(row, logits[index, -1]) for index, row in enumerate(rows)}
        now = time.perf_counter()
        for row in gained:
            row.completion.decode_seconds = now - row.began
        return self._settled(gained)

    def _runs(self) -> list[tuple[int, int]]:
        """Which rows [begin, end) of those that decode each run of a step is of."""
        rows = len(self.decoding)
        return [(0, rows)] if self.together else [(index, index + 1) for index in range(rows)]

    def _verify(self, row: Row) -> str:
        """Run the row's last token and a draft of those behind it at once; return the text that is now certain.

        From each logits a token is chosen as ever. Where it is the draft's, the next logits are those that would have
        followed, else the rest is taken back. So tokens are those of decoding one by one, sampled ones too: a draft is
        accepted with the probability that the model gives it, and what is chosen else follows the rest of the
        distribution, which is the rule of speculative sampling (Leviathan et al., 2023) where drafts are certain.
        """
        assert row.lookup is not None
        cache, completion = self.cache.row(0), row.completion
        draft = row.lookup.draft(min(row.request.max_new_tokens - len(completion.tokens), cache.room) - 1)
        tokens = np.array([[completion.tokens[-1], *draft]], dtype=np.int64)
        logits = self._step(0, 1, tokens.shape[1]).run(tokens)[0]
        text, accepted = _accepted(row, logits[0]), 0
        while not row.ended and draft[accepted : accepted + 1] == completion.tokens[-1:]:
            accepted += 1
            text += _accepted(row, logits[accepted])
        cache.truncate(cache.read - len(draft) + accepted)
        row.lookup.judge(len(draft), accepted)
        completion.drafted_tokens += len(draft)
        completion.accepted_tokens += accepted
        return text

    def _step(self, begin: int, end: int, tokens: int) -> Step:
        if (begin, end, tokens) not in self._steps:
            self._steps[begin, end, tokens] = Step(self.session, self.cache.rows(begin, end), tokens)
        return self._steps[begin, end, tokens]

    def _settled(self, gained: dict[Row, str]) -> list[tuple[Row, str]]:
        """Let rows that have ended leave; return what texts gain, with what was held back to their ends."""
        for row in [row for row in gained if row.ended]:
            if row.failure is None:
                gained[row] += row.finish()
            self._leave(self.decoding.index(row))
        return list(gained.items())

    def _leave(self, index: int) -> None:
        """Close the gap that a row leaves: the last of those that decode moves there, what is being read behind it."""
        last = len(self.decoding) - 1
        if index != last:
            self.cache.row(index).take(self.cache.row(last))
            self.decoding[index] = self.decoding[last]
        self.decoding.pop()
        if self.reading is not None:
            self.cache.row(last).take(self.cache.row(last + 1))


def _accepted(row: Row, logits: Logits) -> str:
    """Let a row choose its next token; return the text that is now certain, none where the row fails."""
    try:
        return row.accept(logits)
    except GenerationError as error:
        row.failure = error
        return ""


def run_row(batch: Batch, row: Row, context: Context | None = None) -> Generator[str, None, None]:
    """Yield the text of one row of an idle batch, piece by piece. context: whose cache it is, used meanwhile."""
    with nullcontext() if context is None else context.used():
        batch.add(row)
        while not batch.idle:
            yield from (piece for _, piece in batch.step() if piece)
        row.require_no_failure()
