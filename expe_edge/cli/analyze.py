"""`expe-edge analyze`."""

from __future__ import annotations

from pathlib import Path

import click

from expe_edge.cli.flags import Setting
from expe_edge.cli.output import PATH, TEXT_FIELD, report_written, require_plot, require_writable, sources, write_json


@click.command(short_help="Show what positions leave of the embedding, and where attention reaches.")
@click.argument("models", nargs=-1, type=PATH, required=True, metavar="CHECKPOINT …")
@sources("--data", "Text to read; else the first checkpoint's held-out documents.")
@TEXT_FIELD
@click.option(
    "--length",
    cls=Setting,
    setting="lengths",
    default=4,
    show_default=True,
    help="Length of texts, in training lengths.",
)
@click.option("--documents", default=8, show_default=True, help="Most documents to read.")
@click.option("--seed", default=0, show_default=True, help="Seed of examples and of dimensions left out at random.")
@click.option("--json", "json_file", type=PATH, help="Write all figures there.")
@click.option("--plot", "plot_file", type=PATH, help="Draw slopes, reach, position and variance there (.png, .svg).")
def analyze(
    models: tuple[Path, ...],
    data: tuple[str, ...],
    text_field: str,
    length: int,
    documents: int,
    seed: int,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Show what becomes of the dimensions that positions override, and how far back every head looks.

    CHECKPOINT are checkpoints of one tokenizer, with any encodings. Measured are size and variance of the first
    dimensions, neighbours of tokens without them, how well a linear probe reads positions off the residual stream,
    slopes, and the distance within which attention lies; docs/analyze.md says what each figure means.
    """
    require_writable(json_file)
    require_plot(plot_file)
    from rich.console import Console

    from expe_edge.cli.analyze_plots import plot_analysis
    from expe_edge.cli.analyze_tables import analysis_tables
    from expe_edge.cli.tables import print_whole
    from expe_edge.quality import analysis

    settings = analysis.AnalysisSettings(length=length, documents=documents, seed=seed)
    report = analysis.analyze(models, settings, sources=data, text_field=text_field)
    for table in analysis_tables(report):
        print_whole(table, Console())
    write_json(json_file, report.to_dict())
    if plot_file is not None:
        plot_analysis(report, plot_file)
    report_written(json_file, plot_file)
