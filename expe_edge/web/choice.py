"""Which package a page shows first: in WebAssembly formats are as fast as nowhere else."""

from __future__ import annotations

from collections.abc import Sequence

from expe_edge.package.manifest import Manifest

#: Speed of decoding in WebAssembly, to that of float32, by the linears' format: medians of `python -m benchmarks.web`.
SPEED = {
    "float32": 1.0,
    "float16": 1.0,
    "bfloat16": 1.0,
    "int8-dynamic": 0.76,
    "int8-static": 0.77,
    "int8-weight": 0.23,
    "int4-weight": 0.15,
}
#: Formats in the words of who has not read about them.
WORDS = {
    "float32": "32-bit floats",
    "float16": "16-bit floats",
    "bfloat16": "16-bit floats",
    "int8-dynamic": "8-bit integers",
    "int8-static": "8-bit integers, fixed ranges",
    "int8-weight": "8-bit weights",
    "int4-weight": "4-bit weights",
    "auto": "a format for each weight",
}
#: Speed with an int8 cache, to that with a float cache.
INT8_CACHE = 0.7
#: Formats below this are called slow.
SLOW = 0.5


def speed_of(manifest: Manifest) -> float:
    """Return how fast a package may be expected to decode in WebAssembly, to the same model in float32."""
    return _linears_speed(manifest) * (INT8_CACHE if manifest.contract.cache_dtype == "int8" else 1.0)


def _linears_speed(manifest: Manifest) -> float:
    formats = list(manifest.linears.values()) or [manifest.precision]
    return len(formats) / sum(1 / SPEED.get(name, min(SPEED.values())) for name in formats)


def order_of(sizes: Sequence[int], speeds: Sequence[float]) -> list[int]:
    """Return the packages' indices in the order to show them: the fewest bytes for their speed first.

    Who opens a page waits for its bytes once and for its tokens each time; half the bytes are worth half the speed.
    """
    return sorted(range(len(sizes)), key=lambda index: sizes[index] / speeds[index])


def note_of(manifest: Manifest) -> str:
    """Say in a few words what the choice of a package means."""
    notes = [WORDS.get(manifest.precision, manifest.precision)]
    if _linears_speed(manifest) < SLOW:
        notes.append("slow in browsers, which restore its weights at every token")
    if manifest.contract.cache_dtype == "int8":
        notes.append("a quarter of the memory for long texts")
    if manifest.contract.growing_cache:
        notes.append("runs on WebGPU too")
    return "; ".join(notes)
