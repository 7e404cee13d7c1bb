"""What figures depend on beside what is measured: versions, the processor."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("expe-edge", "torch", "transformers", "tokenizers", "numpy", "onnxruntime")


def versions(libraries: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Return the versions of Python and of libraries, those that are installed."""
    found = {"python": platform.python_version(), **{name: _version(name) for name in libraries}}
    return {name: each for name, each in found.items() if each}


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def processor() -> str:
    """Return the processor's name as Linux has it, or what Python knows of the machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
