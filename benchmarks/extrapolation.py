"""Loss by length of every encoding, trained the same way, over several seeds, with paired differences to one of them.

    python -m benchmarks.extrapolation --out runs/extrapolation
    python -m benchmarks.extrapolation --out runs/eight-heads --variant expe --variant alibi -- --num-attention-heads 8
    python -m benchmarks.extrapolation --out runs/small --seeds 0 --variant expe --variant alibi --variant rotary \\
        --lengths 1,2,4,8,16,32 -- --preset small --save-every 25

Finished runs and their scores are kept, and unfinished ones go on from their last checkpoint, so that the command can
be interrupted and grown; OUT/NAME.log shows how far a run is. Runs go `--jobs` at a time, one thread each: on small
models that is faster than one run on all cores.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

Double = npt.NDArray[np.float64]

OFFSETS = "--position-offset 64"
PAPER = "--positional-parameter where=query_key"
#: Name of a variant to the flags of `expe-edge train` that make it.
VARIANTS = {
    "expe": "--positional expe",
    "expe, paper": f"--positional expe {PAPER}",
    "expe, paper, offsets": f"--positional expe {PAPER} {OFFSETS}",
    "expe, paper, alibi slopes, offsets": f"--positional expe {PAPER} --positional-parameter slopes=alibi {OFFSETS}",
    "exqpe": "--positional exqpe",
    "exqpe, paper": f"--positional exqpe {PAPER}",
    "exqpe, paper, offsets": f"--positional exqpe {PAPER} {OFFSETS}",
    "alibi": "--positional alibi",
    "rotary": "--positional rotary",
    "rotary, offsets": f"--positional rotary {OFFSETS}",
    "sinusoidal": "--positional sinusoidal",
    "sinusoidal, offsets": f"--positional sinusoidal {OFFSETS}",
    "relative": "--positional relative",
    "none": "--positional none",
}
#: The losses of a run's held-out documents, in its directory.
SCORES_FILE = "losses.json"


def flags_of(variant: str) -> list[str]:
    """Return the flags of a name in `VARIANTS`, or those that `NAME=FLAGS` spells out."""
    name, spelled, flags = variant.partition("=")
    if not spelled and name not in VARIANTS:
        raise click.BadParameter(f"unknown variant {name!r}; available: {', '.join(VARIANTS)}, or NAME=FLAGS")
    return shlex.split(flags if spelled else VARIANTS[name])


def train(out: Path, variant: str, seed: int, extra: Sequence[str] = ()) -> Path:
    """Train one variant, unless its finished checkpoint is there; go on with one that was interrupted."""
    name = variant.partition("=")[0].replace(", ", "-").replace(" ", "-")
    directory = out / f"{name}-seed{seed}"
    if not (directory / "model.safetensors").is_file():
        resumed = any(directory.glob("trainer/checkpoint-*/trainer_state.json"))
        flags = [*extra, *flags_of(variant), "--seed", str(seed), "--out", str(directory)]
        run_alone(["expe_edge", "train", *flags, "--resume" if resumed else "--force"], out / f"{directory.name}.log")
    return directory


def score(directory: Path, lengths: Sequence[int], documents: int, texts: Sequence[str] = ()) -> Double:
    """Return the mean loss of every document and bucket, (documents, buckets), nats per token; kept beside the run."""
    wanted, kept = {"lengths": list(lengths), "documents": documents, "texts": list(texts)}, directory / SCORES_FILE
    if kept.is_file():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if {"texts": [], **found["asked"]} == wanted:
            return np.array(found["losses"])
    command = ["benchmarks.extrapolation_scores", str(directory), ",".join(map(str, lengths)), str(documents)]
    run_alone([*command, *texts], directory / "scoring.log")
    return np.array(json.loads(kept.read_text(encoding="utf-8"))["losses"])


def run_alone(command: Sequence[str], log: Path) -> None:
    """Run a module in a process of its own, with one thread; what it prints, its progress too, goes to `log`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, "-m", *command], env=environment, check=False, stdout=file, stderr=subprocess.STDOUT
        )
    if done.returncode:
        raise click.ClickException(f"{shlex.join(command)} failed; {log} says why")


def paired_difference(losses: Double, others: Double) -> tuple[Double, Double]:
    """Return the mean difference of losses (seeds, documents, buckets) and its standard error, (buckets,) each.

    Both seeds and documents are samples, crossed: the variance of the mean is that of a two-way random-effects
    analysis of variance without replication. With one seed it is that over documents alone.
    """
    difference = losses - others
    seeds, documents, _ = difference.shape
    mean = difference.mean(axis=(0, 1))
    by_document, by_seed = difference.mean(axis=0), difference.mean(axis=1)
    if documents < 2:
        return mean, np.full_like(mean, math.nan)
    variance = by_document.var(axis=0, ddof=1) / documents
    if seeds > 1:
        residual = difference - by_document[None] - by_seed[:, None] + mean
        noise = (residual**2).sum(axis=(0, 1)) / ((seeds - 1) * (documents - 1))
        variance = np.maximum(variance + by_seed.var(axis=0, ddof=1) / seeds - noise / (seeds * documents), 0)
    return mean, np.sqrt(variance)


def table(losses: Mapping[str, Double], against: str, ends: Sequence[int]) -> Table:
    """Lay out the mean loss of every variant (seeds, documents, buckets), and its difference to one of them."""
    seeds, documents, _ = losses[against].shape
    found = Table(title=f"nats per token, {seeds} seeds, {documents} documents; ± standard error, paired")
    for heading in ("", *(f"{begin}–{end} N" for begin, end in pairwise([0, *ends]))):
        found.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, values in losses.items():
        found.add_row(f"[bold]{name}", *(f"{loss:.3f}" for loss in values.mean(axis=(0, 1))))
        if name != against:
            cells = (f"{m:+.3f} ± {e:.3f}" for m, e in zip(*paired_difference(values, losses[against]), strict=True))
            found.add_row(f"less {against}", *cells)
    return found


def report(losses: Mapping[str, Double], against: str, ends: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
    """The same as plain data; `nll` is (seeds, buckets) for each variant."""
    differences = {name: paired_difference(values, losses[against]) for name, values in losses.items()}
    return {
        "lengths": list(ends),
        "seeds": list(seeds),
        "documents": losses[against].shape[1],
        "nll": {name: values.mean(axis=1).tolist() for name, values in losses.items()},
        "against": against,
        "difference": {name: mean.tolist() for name, (mean, _) in differences.items()},
        "difference_stderr": {name: error.tolist() for name, (_, error) in differences.items()},
    }


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/extrapolation"), show_default=True)
@click.option("--variant", "variants", multiple=True, help="A known name, or NAME=FLAGS; repeatable. [default: all]")
@click.option("--against", default="alibi", show_default=True, help="The variant that differences are taken to.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--lengths", default="1,2,4,8,16,32,64", show_default=True)
@click.option("--documents", default=12, show_default=True, help="At most so many, of the last length and more.")
@click.option("--text", "texts", multiple=True, help="Score these texts, not the held-out part of the training text.")
@click.option("--jobs", default=os.cpu_count(), show_default=True)
@click.argument("extra", nargs=-1)
def main(
    out: Path,
    variants: tuple[str, ...],
    against: str,
    seeds: str,
    lengths: str,
    documents: int,
    texts: tuple[str, ...],
    jobs: int,
    extra: tuple[str, ...],
) -> None:
    """Train every VARIANT with every seed (EXTRA flags go to `expe-edge train`) and compare them by length."""
    ends, numbers = [int(end) for end in lengths.split(",")], [int(seed) for seed in seeds.split(",")]
    chosen = variants or tuple(VARIANTS)
    if against not in [variant.partition("=")[0] for variant in chosen]:
        chosen = (*chosen, against)
    out.mkdir(parents=True, exist_ok=True)

    def losses_of(run: tuple[int, str]) -> Double:
        directory = train(out, run[1], run[0], extra)
        click.echo(f"{directory}: trained", err=True)
        return score(directory, ends, documents, texts)

    runs = [(seed, variant) for seed in numbers for variant in chosen]
    with ThreadPoolExecutor(jobs) as pool:
        scored = dict(zip(runs, pool.map(losses_of, runs), strict=True))
    losses = {variant.partition("=")[0]: np.stack([scored[seed, variant] for seed in numbers]) for variant in chosen}
    Console(width=max(Console().width, 160)).print(table(losses, against, ends))
    text = json.dumps(report(losses, against, ends, numbers), indent=2)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
