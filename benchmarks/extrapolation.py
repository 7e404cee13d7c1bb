"""Perplexity by length of every encoding, trained the same way, over several seeds.

    python -m benchmarks.extrapolation --out runs/extrapolation

Finished runs are kept, so that the command can be interrupted and grown. Training runs `--jobs` at a time, one thread
each: on small models that is faster than one run on all cores.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

#: Name of a variant to the flags of `expe-edge train` that make it.
VARIANTS = {
    "expe": ["--positional", "expe"],
    "rotary": ["--positional", "rotary"],
    "sinusoidal": ["--positional", "sinusoidal"],
    "alibi": ["--positional", "alibi"],
    "exqpe": ["--positional", "exqpe"],
    "relative": ["--positional", "relative"],
    "none": ["--positional", "none"],
    "expe, offset 0": ["--positional", "expe", "--position-offset", "0"],
    "sinusoidal, offset 0": ["--positional", "sinusoidal", "--position-offset", "0"],
    "exqpe, offset 0": ["--positional", "exqpe", "--position-offset", "0"],
}


def train(out: Path, variant: str, seed: int, extra: list[str]) -> Path:
    """Train one variant, unless its finished checkpoint is there."""
    directory = out / f"{variant.replace(', ', '-').replace(' ', '')}-seed{seed}"
    if not (directory / "model.safetensors").is_file():
        command = ["expe_edge", "train", *VARIANTS[variant], "--seed", str(seed), "--out", str(directory), "--force"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", *command, *extra], env=environment, check=True, capture_output=True)
    return directory


def measure(directories: list[Path], lengths: list[int], documents: int) -> dict[str, list[float]]:
    """Return nats per token by bucket for each directory, all on the same documents."""
    from expe_edge.comparison import compare_by_length
    from expe_edge.scoring import open_scorer

    comparison = compare_by_length([open_scorer(directory) for directory in directories], lengths, documents)
    return {name: [result.nll for result in comparison.of(name)] for name in comparison.models}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/extrapolation"), show_default=True)
@click.option("--variant", "variants", multiple=True, default=("expe", "rotary", "sinusoidal"), show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--lengths", default="1,2,4,8,16", show_default=True)
@click.option("--documents", default=24, show_default=True)
@click.option("--jobs", default=os.cpu_count(), show_default=True)
@click.argument("extra", nargs=-1)
def main(
    out: Path, variants: tuple[str, ...], seeds: str, lengths: str, documents: int, jobs: int, extra: tuple[str, ...]
) -> None:
    """Train every VARIANT with every seed (EXTRA flags go to `expe-edge train`) and compare them by length."""
    ends = [int(end) for end in lengths.split(",")]
    runs = [(variant, int(seed)) for seed in seeds.split(",") for variant in variants]
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        directories = list(pool.map(lambda run: train(out, *run, list(extra)), runs))
    losses = measure(directories, ends, documents)
    by_variant: dict[str, list[list[float]]] = {variant: [] for variant in variants}
    for (variant, _), values in zip(runs, losses.values(), strict=True):
        by_variant[variant].append(values)
    table = Table(title=f"perplexity by length, mean ± standard deviation over seeds {seeds}")
    table.add_column("")
    for begin, end in pairwise([0, *ends]):
        table.add_column(f"{begin}–{end} N", justify="right")
    for variant, values in by_variant.items():
        perplexity = np.exp(np.array(values))
        spread = perplexity.std(axis=0, ddof=1) if len(values) > 1 else np.full(len(ends), math.nan)
        table.add_row(variant, *(f"{m:.2f} ± {s:.2f}" for m, s in zip(perplexity.mean(axis=0), spread, strict=True)))
    Console().print(table)
    report = {"lengths": ends, "seeds": seeds, "documents": documents, "nll": by_variant}
    (out / "results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
