"""How many threads an operator is given where nobody says."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from expe_edge.runtime.control_groups import control_groups

#: onnxruntime's own variable for it, which it reads since 1.32.
VARIABLE = "ORT_INTRA_OP_NUM_THREADS"
#: Cores of less than this share of the fastest one's capacity get no thread: the others would wait for them.
SLOW = 0.8


def default_threads() -> int:
    """Return one thread for each fast core that this process may use, and no more than its control groups allow.

    `ORT_INTRA_OP_NUM_THREADS` says otherwise. onnxruntime itself takes one for each physical core of the machine,
    whatever the process may use, and binds each to a core.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen.isdecimal() and int(chosen) > 0:
        return int(chosen)
    quota, most = processor_quota(), cores(usable())
    return most if quota is None else min(most, max(1, int(quota + 0.5)))


def usable() -> list[int]:
    """Return the logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores(processors: Iterable[int], root: Path = Path("/")) -> int:
    """Return how many physical cores `processors` are on, the slow ones of a hybrid machine left out.

    Where the system does not say, each processor is a core. root: of the file system that `sys` is looked for in.
    """
    devices = root / "sys/devices/system/cpu"
    capacities = {number: _capacity(devices / f"cpu{number}") for number in processors}
    fast = [number for number, capacity in capacities.items() if capacity >= SLOW * max(capacities.values())]
    return len({_siblings(devices / f"cpu{number}") for number in fast})


def _capacity(processor: Path) -> float:
    """Return how fast a processor is beside the others, by what the kernel's scheduler goes by, or its clock."""
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        with suppress(OSError, ValueError):
            return float((processor / name).read_text())
    return 1.0


def _siblings(processor: Path) -> str:
    """Return what is the same for all processors of a core."""
    try:
        return (processor / "topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return processor.name


def processor_quota(root: Path = Path("/")) -> float | None:
    """Return how many processors' time control groups let this process have; None where they do not limit it.

    root: of the file system that `proc` and `sys` are looked for in.
    """
    return min(_quotas(root), default=None)


def _quotas(root: Path) -> Iterator[float]:
    for version, directory in control_groups("cpu", root):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        try:
            words = " ".join((directory / name).read_text() for name in names).split()
            quota, period = (int(word) for word in words)
        except (OSError, ValueError):  # not there, or "max"
            continue
        if quota > 0 and period > 0:  # -1 is no limit
            yield quota / period
