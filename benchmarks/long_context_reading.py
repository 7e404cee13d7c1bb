"""How `benchmarks.long_context` reads: packages in processes of their own, and texts of which many begin alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from expe_edge.divergence import Float
from expe_edge.quality.scoring import Ids, PackageScorer
from expe_edge.runtime import PackageSession
from expe_edge.runtime.memory import PREFILL_CHUNK
from expe_edge.speed.apart import Apart
from expe_edge.speed.measuring import peak_bytes, read


@dataclass(frozen=True, eq=False)
class Part:
    """What a package made of a part of a text.

    logits: (t, V). prefill: seconds of the runs over many tokens. decode: seconds of each run over one. peak: the
    largest resident set of its process until then, in bytes.
    """

    logits: Float
    prefill: float
    decode: list[float]
    peak: int


class Reader(Apart):
    """A package that reads one text, part by part, in a process of its own.

    Args:
        capacity: tokens of the text. threads: within an operator. chunk: tokens of a run.

    Attributes:
        opened: bytes that the process held before it read anything.

    Raises:
        As `PackageSession.load` and `new_cache`.
    """

    def __init__(self, path: Path, capacity: int, threads: int, chunk: int) -> None:
        super().__init__(_Reading, path, capacity, threads, chunk)
        self.opened: int = self.call("opened")

    def read(self, tokens: Ids, single: int) -> Part:
        """Append tokens (t,) to what was read, the last `single` one by one."""
        part: Part = self.call("read", tokens, single)
        return part


class _Reading:
    """What the process of a `Reader` holds."""

    def __init__(self, path: Path, capacity: int, threads: int, chunk: int) -> None:
        self.session, self.chunk = PackageSession.load(path, threads=threads), chunk
        self.cache = self.session.new_cache(1, capacity)

    def opened(self) -> int:
        return peak_bytes()

    def read(self, tokens: Ids, single: int) -> Part:
        logits: list[Float] = []
        prefill, decode = read(
            *(self.session, self.cache, tokens, single),
            chunk=self.chunk,
            keep=lambda rows: logits.append(rows.copy()),
        )
        return Part(np.concatenate(logits), prefill, decode, peak_bytes())


class BranchingScorer(PackageScorer):
    """A package as a scorer that goes on where a text departs from the one before it.

    Rows of logits that it has not computed again are NaN; those of the last `PREFILL_CHUNK` tokens never are. Texts in
    lexicographic order are read with the least work: none of what two share is read twice.

    Args:
        capacity: tokens of the longest text. chunk: tokens of a run, of which `PREFILL_CHUNK` is a multiple.
    """

    def __init__(self, session: PackageSession, capacity: int, chunk: int = PREFILL_CHUNK) -> None:
        super().__init__(session)
        self.capacity, self.chunk = capacity, chunk
        self.cache = session.new_cache(1, capacity)
        self.held: Ids = np.zeros(0, dtype=np.int64)  # what the cache holds

    def logits(self, tokens: Ids) -> Iterator[Float]:
        if self.session.contract.growing_cache:  # keeps nothing
            self.cache, self.held = self.session.new_cache(1, self.capacity), tokens[:0]
        kept = shared(self.held, tokens)
        self.held = tokens[:kept]
        self.cache.truncate(kept)
        for _ in range(0, kept, PREFILL_CHUNK):
            yield np.broadcast_to(np.float32(np.nan), (PREFILL_CHUNK, self.session.contract.vocab_size))
        yield from self.session.prefill(self.cache, tokens[kept:], self.chunk)
        self.held = tokens


def shared(held: Ids, tokens: Ids) -> int:
    """Return how many tokens of a text need not be read again after another, in whole chunks but the last."""
    most = max(0, min(len(tokens) - PREFILL_CHUNK, len(held)))
    differ = np.flatnonzero(tokens[:most] != held[:most])
    return int(differ[0] if len(differ) else most) // PREFILL_CHUNK * PREFILL_CHUNK


def in_order(texts: Iterable[bytes]) -> list[Ids]:
    """Return texts, given as the bytes of their ids, so that those which begin alike follow one another."""
    return [np.frombuffer(text, dtype=np.int64) for text in sorted(texts)]


def work(texts: Sequence[Ids], length: int) -> float:
    """Return how many times the work of reading `length` tokens it takes to read texts, one after another.

    The work is taken for that of attention, which grows with the square of the length.
    """
    kept = [0, *(shared(held, tokens) for held, tokens in pairwise(texts))]
    return sum(len(tokens) ** 2 - begin**2 for tokens, begin in zip(texts, kept, strict=False)) / length**2
