"""The ceiling of decoding: how fast the machine reads as many bytes as a step does."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from expe_edge.package.manifest import Manifest

#: Bytes beyond which no cache helps, so that a larger buffer is read no slower.
LARGEST_BUFFER = 2**30
#: A buffer is read until this many seconds have passed, and at least this often; the fastest reading counts.
SECONDS, READINGS = 0.05, 3
#: Formats whose weights are stored in 2 bytes and computed with in 4.
HALF_PRECISION = ("float16", "bfloat16")


def weight_bytes(manifest: Manifest) -> int:
    """Return the bytes of weights that a decode step reads.

    They are those of the package's graph, as they lie in memory, but for an embedding that the head does not share:
    of that one a step reads a row.
    """
    apart = "head" in (part["part"] for part in manifest.parts)
    skipped = ("graph", "embedding") if apart else ("graph",)
    return sum(
        part["bytes"] * (2 if part["format"] in HALF_PRECISION else 1)
        for part in manifest.parts
        if part["part"] not in skipped
    )


def read_bandwidth(size: int, threads: int) -> float:
    """Return the bytes a second at which `threads` together read a buffer of `size` bytes over and over.

    A small buffer stays in the processor's caches, as the weights of a small model do.
    """
    words = np.ones(max(1, min(size, LARGEST_BUFFER) // 8), dtype=np.int64)
    parts = np.array_split(words, threads)
    fastest, readings, began = float("inf"), 0, time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        while readings <= READINGS or time.perf_counter() - began < SECONDS:
            started = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            fastest = min(fastest, time.perf_counter() - started)
            readings += 1
    return words.nbytes / fastest
