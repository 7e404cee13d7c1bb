"""One thread that runs one batch: rows wait in a queue, join at a step, and leave when they end or are not wanted."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from expe_edge.errors import ExPEEdgeError
from expe_edge.runtime import Batch, Generator
from expe_edge.runtime.decoding import Row
from expe_edge.runtime.prefixes import Prefixes
from expe_edge.serve.errors import ApiError, refusal_of
from expe_edge.serve.metrics import Metrics
from expe_edge.serve.settings import ServerSettings

LOG = logging.getLogger("expe_edge.serve")


@dataclass(frozen=True)
class Gain:
    """What a step has brought a row.

    Attributes:
        text: the piece of text that is certain now. begin: the index of the first new token in the row's completion.
            end: behind the last. ended: whether it was the last step. failure: why the row ends without its end.
    """

    row: Row
    text: str = ""
    begin: int = 0
    end: int = 0
    ended: bool = False
    failure: ApiError | None = None


@dataclass
class Progress:
    """When a row arrived, when it got its last token, and how many have been told of."""

    arrived: float
    latest: float = 0.0
    told: int = 0


class Scheduler:
    """Runs rows in a thread of its own, from which it tells what comes of them; all methods are for other threads.

    Args:
        together: whether a step runs all rows at once, as of `Batch`.
        deliver: called after every step with what rows have gained.

    Raises:
        GenerationError: memory has no room for as many rows of as many tokens, or the encoding no positions.
    """

    def __init__(
        self,
        generator: Generator,
        settings: ServerSettings,
        metrics: Metrics,
        deliver: Callable[[Sequence[Gain]], None],
        *,
        together: bool,
    ) -> None:
        self.generator, self.settings, self.metrics, self.deliver = generator, settings, metrics, deliver
        self.together = together
        self.batch = self._new_batch()
        self.queue: deque[Row] = deque()
        self.progress: dict[Row, Progress] = {}
        self.leaving: set[Row] = set()
        self.running: set[Row] = set()
        self.draining = self.stopping = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="expe-edge scheduler", daemon=True)

    def _new_batch(self) -> Batch:
        settings, session = self.settings, self.generator.session
        keeps = settings.prompt_cache >= settings.prefill_chunk and not session.contract.windows
        cache = session.new_cache(settings.rows, settings.context)
        cache.reserve(settings.context)  # a buffer that grows is copied, and all rows wait
        prefixes = Prefixes(settings.prefill_chunk, settings.prompt_cache) if keeps else None
        return Batch(session, cache, settings.prefill_chunk, together=self.together, prefixes=prefixes)

    def start(self) -> None:
        """Begin to run rows."""
        self.thread.start()

    def submit(self, rows: Sequence[Row]) -> None:
        """Let rows join as soon as there is a place for them.

        Raises:
            ApiError: too many wait already, or the server is about to end.
        """
        with self.changed:
            if self.draining:
                raise ApiError(503, "the server is shutting down", code="shutting_down")
            if len(self.queue) + len(rows) > self.settings.queue:
                raise ApiError(429, f"{len(self.queue)} completions wait already; try again", code="queue_full")
            now = time.monotonic()
            self.progress |= {row: Progress(now) for row in rows}
            self.queue.extend(rows)
            self.changed.notify()

    def cancel(self, rows: Iterable[Row]) -> None:
        """Let rows leave that are not wanted any more; nothing is told of them afterwards, but for a step under way."""
        with self.changed:
            self.leaving.update(row for row in rows if row in self.progress)
            self.changed.notify()

    def drain(self) -> list[Row]:
        """Take no more rows, and return those that still wait, which are not run."""
        with self.changed:
            self.draining = True
            waiting = list(self.queue)
            self.leaving.update(waiting)
            self.changed.notify()
        return waiting

    def stop(self) -> None:
        """End the thread after the step that is under way; rows that have not ended are left as they are."""
        with self.changed:
            self.draining = self.stopping = True
            self.changed.notify()
        if self.thread.is_alive():
            self.thread.join()

    def _work(self) -> None:
        while self._has_work():
            gains = self._step()
            if gains:
                self.deliver(gains)

    def _has_work(self) -> bool:
        """Wait for rows; let those join for which there is a place, and those leave that shall. False at the end."""
        with self.changed:
            while not (self.stopping or self.leaving or self.running or self.queue):
                self.metrics.waiting(0, 0)
                self.changed.wait()
            for row in self.leaving:
                self._forget(row)
            self.leaving.clear()
            while self.queue and len(self.running) < self.settings.rows:
                row = self.queue.popleft()
                self.running.add(row)
                self.batch.add(row)
            self.metrics.waiting(len(self.queue), len(self.running))
            return not self.stopping

    def _forget(self, row: Row) -> None:
        if row in self.running:
            self.running.remove(row)
            self.batch.remove(row)
            self.metrics.ended("cancelled")
        elif row in self.queue:
            self.queue.remove(row)
            self.metrics.ended("cancelled")
        self.progress.pop(row, None)

    def _step(self) -> list[Gain]:
        decoding = len(self.batch.decoding)
        try:
            gained = self.batch.step()
        except Exception as error:  # whatever a library raises, the server goes on with what comes next
            LOG.exception("a step failed")
            return self._lose_all(error)
        if decoding:
            self.metrics.step(decoding)
        with self.changed:
            return [self._gain(row, text) for row, text in gained if row in self.progress]

    def _lose_all(self, error: Exception) -> list[Gain]:
        """Tell all rows that run of an error that is nobody's, and begin with an empty batch."""
        reason = str(error) if isinstance(error, ExPEEdgeError) else "an internal fault; the server's log has more"
        failure = ApiError(500, reason, code="step_failed")
        with self.changed:
            lost = [Gain(row, failure=failure) for row in self.running]
            for row in self.running:
                self.progress.pop(row, None)
                self.metrics.ended("failed")
            self.running.clear()
            self.batch = self._new_batch()
        return lost

    def _gain(self, row: Row, text: str) -> Gain:
        progress, now, count = self.progress[row], time.monotonic(), len(row.completion.tokens)
        begin, progress.told = progress.told, count
        if begin:
            self.metrics.next_token(now - progress.latest)
        elif count:
            self.metrics.first_token(now - progress.arrived, row.completion)
        progress.latest = now
        if row.ended:
            self.running.discard(row)
            del self.progress[row]
            self.metrics.ended("failed" if row.failure is not None else str(row.finish_reason))
        failure = None if row.failure is None else refusal_of(row.failure)
        return Gain(row, text, begin, count, row.ended, failure)
