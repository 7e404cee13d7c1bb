"""What benchmarks of time and memory share."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

#: Bytes of the unit that `ru_maxrss` counts in: macOS counts bytes, Linux kilobytes.
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def peak_bytes() -> int:
    """Return the largest resident set that this process has had.

    Linux lets a new program inherit `ru_maxrss` of the process that started it, but not what /proc says.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
    lines = status.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def quartiles(values: npt.ArrayLike) -> list[float]:
    """Return the first quartile, the median and the third, rounded to three places; NaN of nothing."""
    found = np.asarray(values, dtype=np.float64)
    return [float(round(q, 3)) for q in np.quantile(found, [0.25, 0.5, 0.75])] if found.size else [float("nan")] * 3
