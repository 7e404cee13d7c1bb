"""Which package a page shows first, and in which form it runs: in WebAssembly formats are as fast as nowhere else."""

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
    "int8-weight": 0.99,
    "int4-weight": 0.94,
}
#: Weights in blocks, by their bits: WebAssembly has no kernel for them, and restores the whole matrix at every run.
BLOCKS = {"int8-weight": 8, "int4-weight": 4}
#: So the page restores them once, when it opens a package. The most bytes that it takes for that, a quarter of the
#: memory that WebAssembly has; and their speed where it does not.
MOST_FLOATS = 2**30
BLOCKS_SPEED = {"int8-weight": 0.23, "int4-weight": 0.15}
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
    speeds = SPEED if has_float_weights(manifest) else SPEED | BLOCKS_SPEED
    formats = list(manifest.linears.values()) or [manifest.precision]
    return len(formats) / sum(1 / speeds.get(name, min(speeds.values())) for name in formats)


def restored_bytes(manifest: Manifest) -> int:
    """Return the memory that weights in blocks take as floats; scales are counted as weights."""
    stored = {part["part"]: part["bytes"] for part in manifest.parts}
    stored.setdefault("head", stored.get("embedding", 0))  # tied
    blocks = ((name, BLOCKS[kind]) for name, kind in manifest.linears.items() if kind in BLOCKS)
    return sum(stored.get(name, 0) * 32 // bits for name, bits in blocks)


def has_float_weights(manifest: Manifest) -> bool:
    """Tell whether the page restores weights in blocks when it opens a package.

    In a portable graph that is a setting for all that is quantized, which would cost int8-static its kernels.
    """
    if manifest.contract.growing_cache and "int8-static" in manifest.linears.values():
        return False
    return 0 < restored_bytes(manifest) <= MOST_FLOATS


def order_of(sizes: Sequence[int], speeds: Sequence[float]) -> list[int]:
    """Return the packages' indices in the order to show them: the fewest bytes for their speed first.

    Who opens a page waits for its bytes once and for its tokens each time; half the bytes are worth half the speed.
    """
    return sorted(range(len(sizes)), key=lambda index: sizes[index] / speeds[index])


def note_of(manifest: Manifest) -> str:
    """Say in a few words what the choice of a package means."""
    notes = [WORDS.get(manifest.precision, manifest.precision)]
    if has_float_weights(manifest):
        notes.append(f"{restored_bytes(manifest) / 1e6:.0f} MB of memory, as browsers are fast with floats alone")
    elif _linears_speed(manifest) < SLOW:
        notes.append("slow in browsers, which restore its weights at every token")
    if manifest.contract.cache_dtype == "int8":
        notes.append("a quarter of the memory for long texts")
    if manifest.contract.growing_cache:
        notes.append("runs on WebGPU too")
    return "; ".join(notes)
