"""`expe-edge sensitivity`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from expe_edge.cli.flags import Setting
from expe_edge.cli.output import (
    PATH,
    TEXT_FIELD,
    report_written,
    require_counts,
    require_plot,
    require_writable,
    sources,
    write_json,
)
from expe_edge.quant.recipe import (
    BLOCK_SIZES,
    CALIBRATION_WINDOWS,
    PRECISIONS,
    SOLVERS,
    Recipe,
    require_known,
    require_used,
)

#: Precisions that a single weight can be measured in.
MEASURABLE = tuple(name for name in PRECISIONS if name not in ("float32", "auto"))


@click.command(short_help="Measure what each weight costs when quantized.")
@click.argument("source", type=PATH, metavar="PACKAGE|CHECKPOINT")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    default=("int8-dynamic", "int4-weight"),
    show_default=True,
    metavar="|".join(MEASURABLE),
    help="Format to measure every weight in; repeatable.",
)
@click.option("--solver", metavar="|".join(SOLVERS), help="For integer weights.")
@click.option("--block-size", type=int, help=f"For int*-weight: {', '.join(map(str, BLOCK_SIZES))}.")
@click.option(
    "--calibration-windows",
    cls=Setting,
    setting="windows",
    default=CALIBRATION_WINDOWS,
    show_default=True,
    help="Texts of one training length, for gptq.",
)
@click.option(
    "--length",
    cls=Setting,
    setting="lengths",
    default=1,
    show_default=True,
    help="Length of each text, in training lengths.",
)
@click.option("--documents", default=32, show_default=True, help="Most texts: beginnings of documents.")
@sources("--calibration-data", "Text to calibrate and measure on; else the training text.")
@TEXT_FIELD
@click.option("--seed", default=0, show_default=True, help="Which texts.")
@click.option("--json", "json_file", type=PATH, help="Write all figures there.")
@click.option("--plot", "plot_file", type=PATH, help="Draw a bar for each weight there (.png, .svg).")
def sensitivity(
    source: Path,
    precisions: tuple[str, ...],
    solver: str | None,
    block_size: int | None,
    calibration_windows: int,
    length: int,
    documents: int,
    calibration_data: tuple[str, ...],
    text_field: str,
    seed: int,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Quantize one weight of PACKAGE or CHECKPOINT at a time and measure the KL divergence to float32.

    The cache is measured as well, in int8, where onnxruntime has kernels for it (1.27).
    """
    require_writable(json_file)
    require_plot(plot_file)
    formats = list(dict.fromkeys(precisions))
    for name in formats:
        require_known("precision", name, MEASURABLE)
    recipes = [Recipe(name, solver=solver, block_size=block_size) for name in formats]
    require_used(recipes)
    require_counts(length=length, documents=documents)
    from rich.console import Console

    from expe_edge.calibration.observations import Calibration
    from expe_edge.calibration.sensitivity import default_candidates
    from expe_edge.cli.plots import plot_sensitivity
    from expe_edge.cli.tables import print_whole, sensitivity_table
    from expe_edge.export.exporter import open_exporter

    exporter = open_exporter(
        source,
        calibration=Calibration(windows=calibration_windows, seed=seed),
        calibration_data=calibration_data,
        text_field=text_field,
        progress=lambda line: click.echo(line, err=True),
    )
    recipes = [dataclasses.replace(recipe, portable=exporter.evidence.portable_only) for recipe in recipes]
    for recipe in recipes:
        exporter.require_possible(recipe)
    texts = exporter.text.beginnings((length,), documents)
    candidates = default_candidates(exporter.evidence, formats)
    results = exporter.measure_weights(recipes[0], candidates, texts)
    print_whole(sensitivity_table(results), Console())
    write_json(json_file, {"tokens": sum(map(len, texts)), "results": [result.to_dict() for result in results]})
    if plot_file is not None:
        plot_sensitivity(results, plot_file)
    report_written(json_file, plot_file)
