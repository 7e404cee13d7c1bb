"""`expe-edge compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from expe_edge.cli.output import (
    PATH,
    TEXT_FIELD,
    THREADS,
    report_written,
    require_counts,
    require_plot,
    require_writable,
    sources,
    write_json,
)
from expe_edge.cli.reference import introduce_reference
from expe_edge.errors import ConfigError
from expe_edge.hub.card import LengthQuality, Quality, require_editable_card, update_quality
from expe_edge.package.directory import CARD_FILE, is_package, open_manifest

if TYPE_CHECKING:
    from expe_edge.quality.comparison import Comparison


@click.command(short_help="Measure quality by length.")
@click.argument("models", nargs=-1, type=PATH, metavar="[REFERENCE OTHER …]")
@sources("--data", "Text to score; else the reference's held-out documents.")
@TEXT_FIELD
@click.option("--lengths", default="1,2,4,8,16", show_default=True, help="Ends of the buckets, in training lengths.")
@click.option("--documents", default=24, show_default=True, help="Most documents to score.")
@THREADS
@click.option("--json", "json_file", type=PATH, help="Write all figures there.")
@click.option("--plot", "plot_file", type=PATH, help="Draw perplexity and KL divergence by length there (.png, .svg).")
@click.option("--card", is_flag=True, help="Put the figures into the model cards of the packages that are named.")
def compare(
    models: tuple[Path, ...],
    data: tuple[str, ...],
    text_field: str,
    lengths: str,
    documents: int,
    threads: int | None,
    json_file: Path | None,
    plot_file: Path | None,
    card: bool,
) -> None:
    """Score the same long documents with every model, bucket by bucket of length.

    REFERENCE and OTHER are checkpoints or packages, in any mix; KL divergence and top-1 agreement are taken against
    the reference. Standard errors are over documents. Without any, these are the packages of the reference model, and
    the documents what is held out of the standard library.
    """
    require_writable(json_file)
    require_plot(plot_file)
    carded = [path for path in models if is_package(path)] if card else []
    if card and not carded:
        raise ConfigError("--card writes into packages; name one among the models")
    for path in carded:
        require_editable_card(path)
    from rich.console import Console

    from expe_edge.cli.plots import plot_comparison
    from expe_edge.cli.tables import comparison_table, print_whole
    from expe_edge.package.reference import REFERENCE_PRECISIONS, reference_package
    from expe_edge.quality import comparison
    from expe_edge.quality.scoring import open_side_by_side

    ends = parse_lengths(lengths)
    comparison.require_rising(ends)
    chosen = models or tuple(map(reference_package, REFERENCE_PRECISIONS))
    comparison.unique_names(chosen)
    require_counts(documents=documents, threads=threads)
    scorers, at_once = open_side_by_side(chosen, threads)
    if not models:
        introduce_reference(scorers)
    comparison.require_same_vocabulary(scorers)
    result = comparison.compare_by_length(
        scorers, ends, documents, sources=data, text_field=text_field, at_once=at_once
    )
    print_whole(comparison_table(result), Console())
    write_json(json_file, result.to_dict())
    if plot_file is not None:
        plot_comparison(result, plot_file)
    for path in carded:
        update_quality(open_manifest(path), card_quality(result, result.models[models.index(path)]))
    report_written(json_file, plot_file, *(path / CARD_FILE for path in carded))


def card_quality(result: Comparison, model: str) -> Quality:
    """Return what a comparison measured of a model, as its card has it."""
    reference = None if model == result.models[0] else result.models[0]
    rows = [
        LengthQuality(row.bucket_start, row.bucket_end, row.perplexity, None if reference is None else row.kl)
        for row in result.of(model)
    ]
    return Quality(f"{result.results[0].documents} held-out documents", reference, rows)


def parse_lengths(text: str) -> list[int]:
    """Parse the value of --lengths."""
    return parse_integers("--lengths", text, "1,2,4,8,16")


def parse_integers(flag: str, text: str, example: str) -> list[int]:
    """Parse comma-separated integers, the value of an option.

    Raises:
        ConfigError: they are not.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{flag} {text}: expected comma-separated integers, such as {example}") from error
