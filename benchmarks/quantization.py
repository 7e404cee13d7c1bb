"""Every format of one checkpoint by length, to 64 training lengths: divergence, perplexity, agreement, sizes.

    expe-edge train --config examples/plain-slopes.yaml --out runs/plain
    python -m benchmarks.quantization runs/plain --out runs/quantization

Of another model, all but the cache of keys that carry their positions (`--package` names some of them).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from expe_edge.cli.plots import plot_comparison
from expe_edge.cli.tables import comparison_table, print_whole, short, with_error
from expe_edge.export.exporter import export
from expe_edge.package.directory import Package, read_package
from expe_edge.quality.comparison import BucketResult, Comparison, compare_by_length
from expe_edge.quality.scoring import open_side_by_side
from expe_edge.quant.recipe import Recipe

#: Directory to the positions and recipes of the packages in it. The reference comes first.
PACKAGES: dict[str, tuple[str, list[Recipe]]] = {
    "folded": (
        "folded",
        [
            Recipe("float32"),
            Recipe("float16"),
            Recipe("int8-dynamic"),
            Recipe("int8-static"),
            Recipe("int8-static", reduce_range=True),
            Recipe("int8-weight"),
            Recipe("int4-weight"),
            Recipe("auto", budget_kl=0.002),
            Recipe("float32", cache="int8"),
            Recipe("int8-dynamic", cache="int8"),
            Recipe("int8-static", cache="int8"),
        ],
    ),
    "rtn": ("folded", [Recipe("int4-weight", solver="rtn")]),
    "positioned-keys": ("inline", [Recipe("float32", cache="int8")]),
}
#: The one that is always made: what the others are compared to.
REFERENCE = "folded/float32"


@dataclass(frozen=True)
class Row:
    """One package against float32 over all buckets.

    worst_kl: of the bucket where it is largest. flatness: KL of the farthest bucket over that of the first.
    perplexity: largest change, either way, with its standard error. size, cache: bytes of the package, and of one
    token's cache, over float32's.
    """

    package: str
    worst_kl: float
    flatness: float
    perplexity: float
    perplexity_stderr: float
    size: float
    cache: float
    top1: float
    top1_clear: float


def make_packages(checkpoint: Path, out: Path, wanted: tuple[str, ...]) -> list[Path]:
    """Export the recipes of `PACKAGES` that are wanted by name, all if none is named; always the reference."""
    found = []
    for directory, (positions, recipes) in PACKAGES.items():
        names = (*wanted, REFERENCE)
        if chosen := [recipe for recipe in recipes if not wanted or f"{directory}/{recipe.name}" in names]:
            packages = export(checkpoint, out / directory, chosen, positions=positions, force=True, progress=print)
            found += [package.path for package in packages]
    return found


def measure(paths: list[Path], lengths: list[int], documents: int, threads: int | None = None) -> Comparison:
    """Compare all packages on the held-out documents of the first."""
    scorers, at_once = open_side_by_side(paths, threads)
    return compare_by_length(scorers, lengths, documents, at_once=at_once)


def summarize(name: str, package: Package, reference: Package, results: list[BucketResult]) -> Row:
    """Reduce a package's buckets to one row."""
    divergences = [result.kl for result in results]
    farthest = max(results, key=lambda result: abs(result.perplexity_change))
    return Row(
        package=name,
        worst_kl=max(divergences),
        flatness=divergences[-1] / divergences[0],
        perplexity=farthest.perplexity_change,
        perplexity_stderr=farthest.perplexity_change_stderr,
        size=package.size / reference.size,
        cache=package.manifest.contract.cache_bytes / reference.manifest.contract.cache_bytes,
        top1=min(result.top1 for result in results),
        top1_clear=min(result.top1_clear for result in results),
    )


def table(rows: list[Row]) -> Table:
    """Lay the rows out for a terminal."""
    headings = ("worst KL", "last / first", "perplexity", "size", "cache", "top-1", "but near-ties")
    found = Table(title="Worst bucket of each measure, against float32")
    found.add_column("package", no_wrap=True)
    for heading in headings:
        found.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        found.add_row(
            row.package,
            short(row.worst_kl, 2),
            f"{row.flatness:.2f}",
            with_error(row.perplexity, row.perplexity_stderr, "+.2%"),
            f"{row.size:.3f}",
            f"{row.cache:.2f}",
            f"{row.top1:.1%}",
            f"{row.top1_clear:.2%}",
        )
    return found


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option(
    "--package", "wanted", multiple=True, help="Of all packages only this, as folded/int4-weight; repeatable."
)
@click.option("--lengths", default="1,2,4,8,16,32,64", show_default=True)
@click.option("--documents", default=8, show_default=True)
@click.option("--threads", type=int, help="Threads of each session.")
def main(
    checkpoint: Path, out: Path, wanted: tuple[str, ...], lengths: str, documents: int, threads: int | None
) -> None:
    """Export, compare, print both tables; write results.json and quantization.png into OUT."""
    paths = make_packages(checkpoint, out, wanted)
    result = measure(paths, [int(part) for part in lengths.split(",")], documents, threads)
    reference, *others = map(read_package, paths)
    rows = [
        summarize(name, package, reference, result.of(name))
        for name, package in zip(result.models[1:], others, strict=True)
    ]
    console = Console()
    print_whole(comparison_table(result), console)
    print_whole(table(rows), console)
    report = {"rows": [vars(row) for row in rows], "comparison": result.to_dict()}
    (out / "results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    plot_comparison(result, out / "quantization.png")


if __name__ == "__main__":
    main()
