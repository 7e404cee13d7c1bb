"""Continuous batching: rows that decode together, and join and leave while others go on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from expe_edge.runtime.cache import Cache
from expe_edge.runtime.context import Context
from expe_edge.runtime.decoding import Row
from expe_edge.runtime.session import Ids, PackageSession, Step


@dataclass
class Reading:
    """A row whose prompt is being read. rest: what is still to be read, (T,)."""

    row: Row
    rest: Ids


class Batch:
    """Rows that decode together. Whoever drives it adds rows and calls `step`, in one thread, until it is idle.

    Rows may be added and removed between any two steps. Prompts are read one after another, one chunk for each step of
    the rows that decode, so that no prompt makes them wait for long. Rows that decode stand first in the cache; when
    one leaves, the last takes its place.

    Args:
        cache: its rows are the most that run at once. prefill_chunk: as of `PackageSession.prefill`.
    """

    def __init__(self, session: PackageSession, cache: Cache, prefill_chunk: int | None = None) -> None:
        self.session, self.cache, self.prefill_chunk = session, cache, prefill_chunk
        self.waiting: deque[Row] = deque()
        self.reading: Reading | None = None
        self.decoding: list[Row] = []
        self._steps: dict[tuple[int, int], Step] = {}

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

        The last piece of a row has what was held back to its end; its `completion.finish_reason` is set then.

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
        cache = self.cache.row(place)
        before = cache.read
        logits = next(self.session.prefill(cache, self.reading.rest, self.prefill_chunk, last=True))
        self.reading.rest = self.reading.rest[cache.read - before :]
        row.completion.prefill_seconds += time.perf_counter() - began
        row.has_read(len(self.reading.rest))
        if len(self.reading.rest):
            return []
        self.reading = None
        self.decoding.append(row)
        row.began = time.perf_counter()
        return self._settled({row: row.accept(logits[-1])})

    def _admit(self, row: Row, place: Cache) -> Reading:
        """Give a row its place in the cache, with what was read of its prompt before."""
        if row.prefix is not self.cache:
            place.clear()
            place.begin_with(row.prefix, row.ids)
        rest = place.last() if row.goes_on else place.reuse(row.ids)
        row.completion.reused_tokens = row.completion.prompt_tokens - len(rest)
        place.reserve(int(place.lengths[0]) + len(rest))
        return Reading(row, rest)

    def _decode(self) -> list[tuple[Row, str]]:
        if len(self.decoding) == 1 and self.decoding[0].lookup is not None:
            gained = {self.decoding[0]: self._verify(self.decoding[0])}
        else:
            last = [[row.completion.tokens[-1]] for row in self.decoding]
            logits = self._step(len(last), 1).run(np.array(last, dtype=np.int64))
            gained = {row: row.accept(logits[index, -1]) for index, row in enumerate(self.decoding)}
        now = time.perf_counter()
        for row in gained:
            row.completion.decode_seconds = now - row.began
        return self._settled(gained)

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
        logits = self._step(1, tokens.shape[1]).run(tokens)[0]
        text, accepted = row.accept(logits[0]), 0
        while row.finish_reason is None and draft[accepted : accepted + 1] == completion.tokens[-1:]:
            accepted += 1
            text += row.accept(logits[accepted])
        cache.truncate(cache.read - len(draft) + accepted)
        row.lookup.judge(len(draft), accepted)
        completion.drafted_tokens += len(draft)
        completion.accepted_tokens += accepted
        return text

    def _step(self, rows: int, tokens: int) -> Step:
        if (rows, tokens) not in self._steps:
            self._steps[rows, tokens] = Step(self.session, self.cache.rows(0, rows), tokens)
        return self._steps[rows, tokens]

    def _settled(self, gained: dict[Row, str]) -> list[tuple[Row, str]]:
        """Let rows that have ended leave; return what texts gain, with what was held back to their ends."""
        for row in [row for row in gained if row.finish_reason is not None]:
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


def run_row(batch: Batch, row: Row, context: Context | None = None) -> Generator[str, None, None]:
    """Yield the text of one row of an idle batch, piece by piece. context: whose cache it is, used meanwhile."""
    with nullcontext() if context is None else context.used():
        batch.add(row)
        while not batch.idle:
            yield from (piece for _, piece in batch.step() if piece)
