"""A package that is timed: prefill, decode, first token, and where their time goes, over a cache filled to a depth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from expe_edge.package.contract import GraphContract, HeadGroup
from expe_edge.results import Result
from expe_edge.runtime.cache import Cache
from expe_edge.runtime.history import History
from expe_edge.runtime.session import Ids, Logits, PackageSession
from expe_edge.runtime.storage import Array
from expe_edge.speed.measuring import peak_bytes, read
from expe_edge.speed.operators import RunTimes, profiled, run_times

#: Tokens after which random keys and values repeat themselves.
FILL_BLOCK = 512
#: How often a prefill is profiled.
PROFILED_PREFILLS = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of a piece of work, bytes of its cache, and of the largest resident set that the process has had."""

    seconds: float
    cache_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class PhaseProfile(Result):
    """Where the time of a piece of work goes.

    ms: without the profiler. kernels: what the profiler says of them. python_ms: in our runtime, outside onnxruntime.
    between_ms: what onnxruntime spends between kernels: the rest, which noise can bring below 0.
    """

    ms: float
    kernels: RunTimes
    python_ms: float
    between_ms: float


class TimedPackage:
    """A package that is timed. Keys and values down to a depth are random: speed does not depend on them."""

    def __init__(self, path: Path, threads: int, device: str, kernels: str | None = None) -> None:
        began = time.perf_counter()
        self.session = PackageSession.load(path, threads=threads, device=device, kernels=kernels)
        self.load_seconds, self.threads = time.perf_counter() - began, threads

    def opened(self) -> tuple[float, int]:
        """Return the seconds of loading, and the bytes of the largest resident set."""
        return self.load_seconds, peak_bytes()

    def own_kernels(self) -> bool:
        """Tell whether the package runs kernels that were built here, not onnxruntime's own."""
        return self.session.kernels is not None

    def prefill(self, depth: int, tokens: int) -> Timing:
        """Time the reading of `tokens` after `depth`."""
        cache = filled(self.session, depth, tokens)
        seconds, _ = read(self.session, cache, self._tokens(tokens), 0, last=True)
        return Timing(seconds, cache.nbytes, peak_bytes())

    def decode(self, depth: int, steps: int) -> Timing:
        """Time the reading of one token after `depth`: the median of `steps`."""
        cache = filled(self.session, depth, steps)
        _, seconds = read(self.session, cache, self._tokens(steps), steps)
        return Timing(float(np.median(seconds)), cache.nbytes, peak_bytes())

    def first_token(self, tokens: int) -> float:
        """Return the seconds from a prompt of `tokens` and no cache to the choice of the first token."""
        prompt = self._tokens(tokens)
        began = time.perf_counter()
        for logits in self.session.prefill(self.session.new_cache(1, tokens), prompt, last=True):
            last = logits[-1]
        last.argmax()
        return time.perf_counter() - began

    def profile_decode(self, depth: int, steps: int) -> PhaseProfile:
        """Profile the reading of one token after `depth`: medians over `steps`."""

        def work(session: PackageSession) -> list[float]:
            cache = filled(session, depth, steps + 1)
            return read(session, cache, self._tokens(steps + 1), steps + 1)[1]

        return self._profile(work, runs=1)

    def profile_prefill(self, depth: int, tokens: int) -> PhaseProfile:
        """Profile the reading of `tokens` after `depth`, all runs together."""

        def work(session: PackageSession) -> list[float]:
            return [prefill(session, lambda _: None) for _ in range(PROFILED_PREFILLS + 1)]

        def prefill(session: PackageSession, keep: Callable[[Logits], object]) -> float:
            return read(session, filled(session, depth, tokens), self._tokens(tokens), 0, keep=keep, last=True)[0]

        runs: list[Logits] = []
        prefill(self.session, runs.append)
        return self._profile(work, runs=len(runs))

    def _profile(self, work: Callable[[PackageSession], list[float]], runs: int) -> PhaseProfile:
        """Do `work`, which returns the seconds of pieces of `runs` runs each, profiled and before and after plainly.

        The first piece warms up.
        """
        plain = work(self.session)[1:]
        seconds, events = profiled(self.session, self.threads, work)
        plain += work(self.session)[1:]
        times = run_times(events, runs)
        whole, python = np.median(plain) * 1e3, np.median(seconds[1:]) * 1e3 - times.run_ms
        rest = whole - times.kernels_ms - python
        return PhaseProfile(round(float(whole), 4), times, round(float(python), 4), round(float(rest), 4))

    def _tokens(self, count: int) -> Ids:
        return np.random.default_rng(0).integers(self.session.contract.vocab_size, size=count)


def filled(session: PackageSession, depth: int, more: int) -> Cache:
    """Return a cache of one row that holds `depth` random tokens, with room for `more`."""
    cache = session.new_cache(1, depth + more)
    cache.reserve(depth + more)
    if depth:
        cache.restore(random_tensors(session.contract, depth), History(np.zeros(depth, dtype=np.int64)))
    return cache


def random_tensors(contract: GraphContract, depth: int) -> list[Array]:
    """Return what `depth` tokens may leave in a cache, (heads, n, D) each in the contract's order.

    The numbers are the same in all layers and repeat along the tokens, so that they are quickly made and take little
    memory.
    """
    random = np.random.default_rng(0)
    made: dict[HeadGroup, Array] = {}
    for group in contract.groups:
        block = random.normal(size=(group.heads, FILL_BLOCK, contract.head_size))
        if contract.cache_dtype == "int8":
            block = (block * 32).clip(-128, 127)
        repeats = -(-depth // FILL_BLOCK)
        made[group] = np.tile(block.astype(contract.cache_dtype), (1, repeats, 1))[:, : group.seen(depth)]
    return [made[group] for group in contract.cache_groups]
