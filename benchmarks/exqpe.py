"""ExPE inline, ExPE folded, and a model trained with ExQPE, side by side: what rounding costs each, by length.

    python -m benchmarks.exqpe --out runs/exqpe

Models are trained on the same data and seeds as in `studies/encodings.yaml`, but with slopes that are products alone,
which may stay inline. Divergences are to the same model's own float32 (folded), perplexities absolute.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.quantization import measure
from expe_edge.cli.tables import bucket_name, print_whole, short
from expe_edge.export.exporter import export
from expe_edge.package.directory import read_package
from expe_edge.quality.comparison import BucketResult
from expe_edge.quant.recipe import Recipe
from expe_edge.study.plan import Run
from expe_edge.study.work import train_run
from expe_edge.training.settings import make_settings

#: Formats compared. bfloat16 is of the weights alone; those of 8 bits are rounded to the nearest, as anyone does it.
RECIPES = (
    Recipe("float32"),
    Recipe("bfloat16"),
    Recipe("int8-dynamic", solver="rtn"),
    Recipe("int8-static", solver="rtn"),
    Recipe("int4-weight"),
)
PRECISIONS = tuple(recipe.precision for recipe in RECIPES)
#: Settings with which positions may stay inline.
PLAIN_SLOPES = {"positional_parameters": {"softplus": False, "content_heads": 0}, "output_gate": False}
#: Way to the encoding that a model is trained with, and where its graph has the positions.
WAYS = {
    "ExPE inline": ("expe", "inline"),
    "ExPE folded": ("expe", "folded"),
    "ExQPE inline": ("exqpe", "inline"),
    "ExQPE folded": ("exqpe", "folded"),
}


def packages_of(checkpoint: Path, out: Path) -> dict[str, list[Path]]:
    """Export every precision with positions folded and inline; the first folded one is the reference."""
    return {
        positions: [
            package.path for package in export(checkpoint, out / positions, RECIPES, positions=positions, force=True)
        ]
        for positions in ("folded", "inline")
    }


def measure_seed(
    runs: Path, out: Path, seed: int, lengths: list[int], documents: int, threads: int | None
) -> dict[str, dict[str, Any]]:
    """Return, for every way, results by precision and the bytes that positions take."""
    found: dict[str, dict[str, Any]] = {}
    for encoding in ("expe", "exqpe"):
        run = Run(f"{encoding}-seed{seed}", make_settings(flags={"positional": encoding, "seed": seed, **PLAIN_SLOPES}))
        packages = packages_of(train_run(runs, run), out / run.name)
        paths = [*packages["folded"], *packages["inline"]]
        comparison = measure(paths, lengths, documents, threads)
        results = dict(zip(paths, (comparison.of(model) for model in comparison.models), strict=True))
        for way, (trained, positions) in WAYS.items():
            if trained == encoding:
                found[way] = {
                    "position_bytes": position_bytes(packages[positions][0]),
                    "results": dict(zip(PRECISIONS, (results[path] for path in packages[positions]), strict=True)),
                }
    return found


def position_bytes(package: Path) -> int:
    """Bytes of all stored tensors that are there for positions alone."""
    return sum(part["bytes"] for part in read_package(package).manifest.parts if part["part"] == "positions")


def mean_over_seeds(
    seeds: Sequence[Mapping[str, dict[str, Any]]], way: str, precision: str, measure: str
) -> list[float]:
    """Return a measure by bucket, its geometric mean over seeds."""
    values = [[getattr(result, measure) for result in seed[way]["results"][precision]] for seed in seeds]
    return [float(value) for value in np.exp(np.log(np.maximum(values, 1e-12)).mean(axis=0))]


def table(seeds: Sequence[Mapping[str, dict[str, Any]]], buckets: list[str]) -> Table:
    """Lay out perplexity of float32, then KL divergence of everything."""
    found = Table(title=f"mean over {len(seeds)} seeds; KL divergence to the model's own float32, nats per token")
    for heading in ("", "", *buckets):
        found.add_column(heading, no_wrap=True, justify="right" if heading else "left")
    for way in WAYS:
        size = f"{seeds[0][way]['position_bytes']:,} bytes"
        perplexity = mean_over_seeds(seeds, way, "float32", "perplexity")
        found.add_row(f"[bold]{way}", f"perplexity; {size}", *(f"{value:.2f}" for value in perplexity))
        for precision in PRECISIONS:
            found.add_row("", precision, *(short(value, 1) for value in mean_over_seeds(seeds, way, precision, "kl")))
    return found


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/exqpe"), show_default=True)
@click.option("--runs", type=click.Path(path_type=Path), help="Where checkpoints are or go; by default OUT.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--lengths", default="1,2,4,8,16,32,64", show_default=True)
@click.option("--documents", default=8, show_default=True)
@click.option("--threads", type=int, help="Threads of each session.")
def main(out: Path, runs: Path | None, seeds: str, lengths: str, documents: int, threads: int | None) -> None:
    """Train, export, compare; print the table and write results.json into OUT."""
    ends = [int(end) for end in lengths.split(",")]
    out.mkdir(parents=True, exist_ok=True)
    found = [measure_seed(runs or out, out, int(seed), ends, documents, threads) for seed in seeds.split(",")]
    first: list[BucketResult] = found[0]["ExPE folded"]["results"]["float32"]
    print_whole(table(found, [bucket_name(result, first[0].bucket_end // ends[0]) for result in first]), Console())
    report = [
        {
            way: {
                "position_bytes": values["position_bytes"],
                "results": {name: [r.to_dict() for r in results] for name, results in values["results"].items()},
            }
            for way, values in seed.items()
        }
        for seed in found
    ]
    (out / "results.json").write_text(
        json.dumps({"seeds": seeds, "results": report}, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
