"""Rows of a batch beside rows alone: in how many a bit differs, and what a step takes by how many there are.

    python -m benchmarks.batch_rows expe_edge/reference/int4-weight

Random rows of 1 to 400 tokens decode a token alone and together. Steps of all sizes run in turn: of one token, and of
a chunk of a prompt, which the server reads of one row at a time.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from expe_edge.runtime import PackageSession
from expe_edge.runtime.cache import Cache
from expe_edge.runtime.session import Step
from expe_edge.speed.measuring import quartiles

#: Tokens of the longest row, of a chunk of a prompt, and how many more a cache has room for.
LONGEST, CHUNK, ROOM = 400, 32, 40


def filled(session: PackageSession, rows: int, random: np.random.Generator) -> Cache:
    """Return a cache of rows of random lengths."""
    cache = session.new_cache(rows, LONGEST + ROOM)
    cache.reserve(LONGEST + ROOM)
    for index in range(rows):
        prompt = random.integers(session.contract.vocab_size, size=int(random.integers(1, LONGEST)))
        for _ in session.prefill(cache.row(index), prompt, last=True):
            pass
    return cache


def take_back(cache: Cache, tokens: int = 1) -> None:
    """Take back the last tokens of every row."""
    for index in range(cache.batch):
        cache.row(index).truncate(cache.row(index).read - tokens)


def differing(session: PackageSession, rows: int, random: np.random.Generator) -> tuple[int, float]:
    """Return in how many rows a bit of the logits differs, and the largest difference."""
    cache = filled(session, rows, random)
    tokens = random.integers(session.contract.vocab_size, size=(rows, 1))
    alone = np.concatenate([Step(session, cache.row(i), 1).run(tokens[[i]]).copy() for i in range(rows)])
    take_back(cache)
    differences = np.abs(Step(session, cache, 1).run(tokens) - alone).max(axis=(1, 2))
    return int((differences > 0).sum()), float(differences.max())


def step_times(session: PackageSession, sizes: tuple[int, ...], turns: int, tokens: int) -> dict[str, list[float]]:
    """Return quartiles of milliseconds that a step of so many rows takes, each of so many tokens."""
    cache = filled(session, max(sizes), np.random.default_rng(0))
    steps = {size: Step(session, cache.rows(0, size), tokens) for size in sizes}
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(turns):
        for size, step in steps.items():
            began = time.perf_counter()
            step.run(np.ones((size, tokens), dtype=np.int64))
            times[size].append(1000 * (time.perf_counter() - began))
            take_back(cache.rows(0, size), tokens)
    return {str(size): quartiles(values) for size, values in times.items()}


@click.command()
@click.argument("packages", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--batches", default=25, show_default=True, help="Of 2 to 24 rows, that are compared.")
@click.option("--size", "sizes", multiple=True, type=int, default=(1, 2, 4, 8, 16), show_default=True)
@click.option("--turns", default=25, show_default=True)
@click.option("--threads", type=int)
def main(packages: tuple[Path, ...], batches: int, sizes: tuple[int, ...], turns: int, threads: int | None) -> None:
    """Print a JSON line for each package."""
    for package in packages:
        session, rows, differ, most = PackageSession.load(package, threads=threads), 0, 0, 0.0
        for seed in range(batches):
            random = np.random.default_rng(seed)
            count = int(random.integers(2, 25))
            found, largest = differing(session, count, random)
            rows, differ, most = rows + count, differ + found, max(most, largest)
        figures: dict[str, Any] = {"package": str(package), "rows": rows, "differ": differ, "largest": most}
        times = {"step_ms": 1, "chunk_ms": CHUNK}
        figures |= {name: step_times(session, sizes, turns, tokens) for name, tokens in times.items()}
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
