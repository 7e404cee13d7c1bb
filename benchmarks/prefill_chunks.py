"""What a prefill step of some tokens costs by depth: time for a token, and memory beside the cache.

    python -m benchmarks.prefill_chunks expe_edge/reference/int8-dynamic

The cache is filled with random keys and values, for which depth is a matter of memory alone. Chunks run in turn.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import numpy as np

from expe_edge.runtime import PackageSession
from expe_edge.runtime.session import Step
from expe_edge.speed.measuring import quartiles
from expe_edge.speed.timed import filled


@click.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--depth", "depths", multiple=True, type=int, default=(4096, 16384, 65536))
@click.option("--chunk", "chunks", multiple=True, type=int, default=(16, 32, 64, 128, 256))
@click.option("--turns", default=5, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(package: Path, depths: tuple[int, ...], chunks: tuple[int, ...], turns: int, threads: int) -> None:
    """Print, as JSON lines, milliseconds a token by depth and chunk, and the chunk that is chosen there."""
    session = PackageSession.load(package, threads=threads)
    for depth in depths:
        cache = filled(session, depth, max(chunks))
        times: dict[int, list[float]] = {chunk: [] for chunk in chunks}
        for _ in range(turns):
            for chunk in chunks:
                step, tokens = Step(session, cache, chunk), np.zeros((1, chunk), dtype=np.int64)
                began = time.perf_counter()
                step.run(tokens)
                times[chunk].append(1000 * (time.perf_counter() - began) / chunk)
                cache.truncate(depth)
        found = {str(chunk): quartiles(values) for chunk, values in times.items()}
        print(json.dumps({"depth": depth, "chosen": session.chunk_at(depth), "milliseconds": found}), flush=True)


if __name__ == "__main__":
    main()
