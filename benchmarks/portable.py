"""What a portable package costs: its size, and its time in prefill and decode relative to the ordinary package.

    python -m benchmarks.portable demo/checkpoint

Both run in turn on one thread, so that a busy machine slows both; ratios are medians over the turns, with quartiles.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click
import numpy as np

from expe_edge.export.exporter import export
from expe_edge.quant.recipe import Recipe
from expe_edge.runtime import PackageSession
from expe_edge.speed.measuring import in_turn, quartiles

#: Steps whose median is the time of one, after a prefill.
DECODED = 40


def ratios(sessions: list[PackageSession], context: int, turns: int) -> dict[str, list[float]]:
    """First quartile, median and third quartile of the second session's time over the first's."""
    tokens = np.random.default_rng(0).integers(sessions[0].contract.vocab_size, size=context + DECODED)
    times = in_turn(sessions, tokens, DECODED, turns)  # (turns, 2, 2)
    prefill, decode = (quartiles(times[:, 1, part] / times[:, 0, part]) for part in (0, 1))
    return {"prefill": prefill, "decode": decode}


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--precision", "precisions", multiple=True, default=("float32", "int8-dynamic", "int4-weight"))
@click.option("--turns", default=15, show_default=True)
def main(checkpoint: Path, precisions: tuple[str, ...], turns: int) -> None:
    """Print, as JSON lines, sizes and ratios of time for contexts of 64, 512 and 2048 tokens."""
    with tempfile.TemporaryDirectory() as directory:
        for precision in precisions:
            recipes = [Recipe(precision, portable=portable) for portable in (False, True)]
            packages = export(checkpoint, Path(directory), recipes)
            sessions = [PackageSession.load(package.path, threads=1) for package in packages]
            for context in (64, 512, 2048):
                result = {"precision": precision, "bytes": [package.size_bytes for package in packages]}
                print(json.dumps({**result, "context": context, **ratios(sessions, context, turns)}), flush=True)


if __name__ == "__main__":
    main()
