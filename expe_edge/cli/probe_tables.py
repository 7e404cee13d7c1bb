"""Results of `probe` as tables on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.table import Table
from rich.text import Text

from expe_edge.cli.tables import rows_by_name, with_error
from expe_edge.quality.context_use import ContextUse
from expe_edge.quality.definitions import CODE_DEFINITION
from expe_edge.quality.probing import ProbeReport
from expe_edge.quality.recall import Recall


def probe_tables(report: ProbeReport) -> Iterator[Table]:
    """Yield a table for each probe that has results."""
    if report.context_use:
        yield context_use_table(report)
    for probe in dict.fromkeys(result.probe for result in report.recall):
        results = [result for result in report.recall if result.probe == probe]
        yield definition_table(report, results) if probe == CODE_DEFINITION else recall_table(report, results)
    if report.loss_by_position:
        yield loss_table(report)


def context_use_table(report: ProbeReport) -> Table:
    """Lay context use out as a section for each figure, a row for each model, a column for each length."""
    first = report.context_use[0]
    near = "" if first.near == report.training_length else f"{first.near // report.training_length} "
    lengths = list(dict.fromkeys(result.length for result in report.context_use))
    n = report.training_length
    table = rows_by_name(
        f"Context use: loss of the last {first.tokens // first.documents} tokens of a length, nats per token, "
        f"N = {n}, {first.documents} documents, ± standard error",
        [f"{length // n} N" for length in lengths],
    )
    sections: list[tuple[str, Callable[[ContextUse], str]]] = [
        ("with the whole text", lambda r: with_error(r.full_loss, r.full_loss_stderr, ".3f")),
        (f"with the last {near}N tokens", lambda r: with_error(r.near_loss, r.near_loss_stderr, ".3f")),
        ("gained by far text", lambda r: with_error(r.gained, r.gained_stderr, "+.3f")),
    ]
    for heading, cell in sections:
        table.add_row(f"[bold]{heading}")
        for model in report.models:
            table.add_row(Text(f"  {model}"), *(cell(r) for r in report.context_use if r.model == model))
        table.add_section()
    return table


def recall_table(report: ProbeReport, results: Sequence[Recall]) -> Table:
    """Lay one probe out as a section for each model, a row for each depth, a column for each length."""
    lengths, n = list(dict.fromkeys(result.length for result in results)), report.training_length
    title = (
        f"{results[0].probe}: exact match, nats gained per token of the answer ± standard error; N = {n}, "
        f"{results[0].cases} cases"
    )
    table = rows_by_name(title, [f"{length // n} N" for length in lengths])
    for model in report.models:
        table.add_row(Text(model, style="bold"))
        for depth in dict.fromkeys(result.depth for result in results):
            row = {r.length: r for r in results if (r.model, r.depth) == (model, depth)}
            table.add_row(f"  depth {depth:.0%}", *(_recalled(row[length]) for length in lengths))
        table.add_section()
    return table


def definition_table(report: ProbeReport, results: Sequence[Recall]) -> Table:
    """Lay the probe of real code out as a row for each model, a column for each range of distances."""
    lengths, n = list(dict.fromkeys(result.length for result in results)), report.training_length
    title = f"{results[0].probe}: exact match, nats gained per token of the name ± standard error; by distance, N = {n}"
    table = rows_by_name(title, [f"to {length // n} N" for length in lengths])
    table.add_row("cases", *(str(r.cases) for r in results if r.model == report.models[0]))
    for model in report.models:
        table.add_row(Text(model), *(_recalled(r) for r in results if r.model == model))
    return table


def loss_table(report: ProbeReport) -> Table:
    """Lay loss by position out as a row for each bin, a column for each model."""
    first = report.loss_by_position[0]
    title = f"Loss by position, nats per token, N = {report.training_length}, {first.documents} documents"
    table = rows_by_name(f"{title}, ± standard error", report.models)
    bins: dict[tuple[int, int], list[str]] = {}
    for r in report.loss_by_position:
        bins.setdefault((r.bin_start, r.bin_end), []).append(with_error(r.loss, r.loss_stderr, ".3f"))
    for (start, end), cells in bins.items():
        table.add_row(f"{start}–{end}", *cells)
    return table


def _recalled(result: Recall) -> str:
    return f"{result.exact_match:.0%} {with_error(result.gained, result.gained_stderr, '+.2f')}"
