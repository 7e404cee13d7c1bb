"""What the processors of this machine are, as Linux describes them."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def processor_features(cpuinfo: Path = CPUINFO) -> list[str]:
    """Return what decides which kernels onnxruntime takes, and so how weights are packed for them."""
    return [platform.system(), platform.machine(), platform.processor(), *sorted(set(_features(cpuinfo)))]


def instructions(cpuinfo: Path = CPUINFO) -> set[str]:
    """Return the extensions that every processor has, by Linux's names; none on other systems."""
    kinds = [set(line.partition(":")[2].split()) for line in _features(cpuinfo) if line.startswith("flags:")]
    return set.intersection(*kinds) if kinds else set()


def _features(cpuinfo: Path) -> Iterator[str]:
    """Yield the lines that tell processors apart; those of a machine with several kinds of cores differ."""
    with suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features", "vendor_id", "cpu family", "model", "CPU part"):
                yield f"{name.strip()}:{value.strip()}"
