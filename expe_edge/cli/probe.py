"""`expe-edge probe`."""

from __future__ import annotations

from pathlib import Path

import click

from expe_edge.cli.compare import parse_integers, parse_lengths
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


@click.command(short_help="Measure whether a model uses far text.")
@click.argument("models", nargs=-1, type=PATH, metavar="[MODEL …]")
@sources("--data", "Text to read; else the first model's held-out documents.")
@TEXT_FIELD
@click.option(
    "--probe",
    "probes",
    multiple=True,
    metavar="NAME",
    help="One of context-use, loss-by-position, passkey, keys, first-definition, last-definition, copying, "
    "code-definition; may be repeated.  [default: all]",
)
@click.option("--lengths", default="1,2,4,8,16", show_default=True, help="Lengths of texts, in training lengths.")
@click.option("--near", default=1, show_default=True, help="Text that far text is compared with, in training lengths.")
@click.option("--depths", default="0,25,50,75,100", show_default=True, help="Places of needles, percent of a text.")
@click.option("--documents", default=8, show_default=True, help="Most documents to read.")
@click.option("--cases", default=4, show_default=True, help="Questions for each length and depth.")
@click.option("--seed", default=0, show_default=True, help="Seed of numbers, names and samples.")
@THREADS
@click.option("--json", "json_file", type=PATH, help="Write all figures there.")
@click.option("--plot", "plot_file", type=PATH, help="Draw all probes there (.png, .svg).")
def probe(
    models: tuple[Path, ...],
    data: tuple[str, ...],
    text_field: str,
    probes: tuple[str, ...],
    lengths: str,
    near: int,
    depths: str,
    documents: int,
    cases: int,
    seed: int,
    threads: int | None,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Measure what text far back is worth to every model, and where it fails to be of use.

    MODEL are checkpoints or packages of one tokenizer, in any mix. Context use is what the whole text before a token is
    worth beside its last `--near` N tokens; the probes of recall ask for what stands at a depth of a text;
    docs/probes.md says what each number means. Standard errors are over documents. Without any, it is the reference
    model that is probed, on what is held out of the standard library.
    """
    require_writable(json_file)
    require_plot(plot_file)
    from rich.console import Console

    from expe_edge.cli.probe_plots import plot_probes
    from expe_edge.cli.probe_tables import probe_tables
    from expe_edge.cli.tables import print_whole
    from expe_edge.package.reference import reference_package
    from expe_edge.quality import probing
    from expe_edge.quality.comparison import unique_names
    from expe_edge.quality.scoring import open_side_by_side

    settings = probing.ProbeSettings(
        lengths=tuple(parse_lengths(lengths)),
        documents=documents,
        probes=tuple(dict.fromkeys(probes)) or probing.PROBES,
        near=near,
        depths=tuple(percent / 100 for percent in parse_integers("--depths", depths, "0,50,100")),
        cases=cases,
        seed=seed,
    )
    require_counts(threads=threads)
    chosen = models or (reference_package(),)
    unique_names(chosen)
    scorers, at_once = open_side_by_side(chosen, threads)
    if not models:
        introduce_reference(scorers)
    report = probing.probe(scorers, settings, sources=data, text_field=text_field, at_once=at_once)
    for table in probe_tables(report):
        print_whole(table, Console())
    write_json(json_file, report.to_dict())
    if plot_file is not None:
        plot_probes(report, plot_file)
    report_written(json_file, plot_file)
