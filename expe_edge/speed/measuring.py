"""Time and memory of a package: reading, decoding, the largest resident set, and quartiles of repetitions."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from expe_edge.runtime.cache import Cache
from expe_edge.runtime.session import Ids, Logits, PackageSession, Step

#: Bytes of the unit that `ru_maxrss` counts in: macOS counts bytes, Linux kilobytes.
RSS_UNIT = 1 if sys.platform == "darwin" else 1024
#: What Linux says of this process, in kilobytes.
STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """Return the largest resident set that this process has had.

    Linux lets a new program inherit `ru_maxrss` of the process that started it, but not what /proc says.
    """
    if not STATUS.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
    return status_bytes("VmHWM")


def resident_bytes() -> int:
    """Return the resident set of this process, where /proc says it."""
    return status_bytes("VmRSS")


def status_bytes(name: str) -> int:
    """Return what /proc says of this process under `name`, one of its sizes."""
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def quartiles(values: npt.ArrayLike) -> list[float]:
    """Return the first quartile, the median and the third, rounded to three places; NaN of nothing."""
    found = np.asarray(values, dtype=np.float64)
    return [float(round(q, 3)) for q in np.quantile(found, [0.25, 0.5, 0.75])] if found.size else [float("nan")] * 3


def read(
    session: PackageSession,
    cache: Cache,
    tokens: Ids,
    single: int,
    *,
    chunk: int | None = None,
    last: bool = False,
    keep: Callable[[Logits], object] = lambda _: None,
) -> tuple[float, list[float]]:
    """Append tokens (T,) to a cache of one row, the last `single` one by one; return what they took.

    Args:
        chunk, last: as of `PackageSession.prefill`. keep: is given the logits (t, V) of every run, those of single ones
            only until the next.

    Returns:
        seconds of all runs over many tokens, and of each run over one.

    Raises:
        As `Step.run`.
    """
    together, steps = len(tokens) - single, []
    began = time.perf_counter()
    for logits in session.prefill(cache, tokens[:together], chunk, last=last):
        keep(logits)
    prefill, step = time.perf_counter() - began, Step(session, cache, 1)
    for token in tokens[together:]:
        began = time.perf_counter()
        logits = step.run(token[None, None])[0]
        steps.append(time.perf_counter() - began)
        keep(logits)
    return prefill, steps


def in_turn(sessions: Sequence[PackageSession], tokens: Ids, single: int, turns: int) -> npt.NDArray[np.float64]:
    """Return what every session takes to read tokens (T,), one session after the other in every turn.

    So a busy machine slows all of them. A turn before is not counted.

    Returns:
        seconds of the prefill and the median of the last `single` tokens' steps, (turns, sessions, 2).
    """

    def seconds(session: PackageSession) -> tuple[float, float]:
        prefill, steps = read(session, session.new_cache(1, len(tokens)), tokens, single)
        return prefill, float(np.median(steps))

    for session in sessions:
        seconds(session)
    return np.array([[seconds(session) for session in sessions] for _ in range(turns)])
