"""Results as tables on a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from expe_edge.quality.comparison import NEAR_TIE, BucketResult, Comparison

if TYPE_CHECKING:
    from expe_edge.calibration.sensitivity import Sensitivity


def print_whole(table: Table, console: Console) -> None:
    """Print `table` with no name and no figure cut: a terminal that is too narrow breaks its lines instead."""
    console.width = max(console.width, Console(width=10_000).measure(table).maximum)
    console.print(table)


def rows_by_name(title: str, columns: Iterable[str]) -> Table:
    """Return a table whose first column names rows, all columns as wide as what they hold; no text is markup."""
    table = Table(title=Text(title, style="table.title"), box=box.SIMPLE, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(Text(column), justify="right", no_wrap=True)
    return table


def bucket_name(result: BucketResult, training_length: int) -> str:
    """Name a bucket by the positions it holds, in training lengths N."""
    return f"{result.bucket_start // training_length}–{result.bucket_end // training_length} N"


def short(value: float, digits: int) -> str:
    """Write a small number in scientific notation without padding its exponent: 3.8e-4."""
    return f"{value:.{digits}e}".replace("e-0", "e-").replace("e+0", "e")


def with_error(value: float, error: float | None, form: str) -> str:
    """Write a figure and its standard error; the figure alone where a single sample gives none."""
    figure = f"{value:{form}}"
    return figure if error is None or math.isnan(error) else f"{figure} ± {error:{form.lstrip('+')}}"


def divergence(kl: float, error: float) -> str:
    """Write a KL divergence, and its standard error if there is one: 3.8e-4 ± 2e-5."""
    return short(kl, 1) if math.isnan(error) else f"{short(kl, 1)} ± {short(error, 0)}"


def comparison_table(comparison: Comparison) -> Table:
    """Lay a comparison out as a section for each measure, a row for each model, a column for each bucket."""
    n = comparison.training_length
    title = f"Quality by position, N = {n} tokens, {comparison.results[0].documents} documents, ± standard error"
    if len(comparison.models) > 1:
        title += (
            f"\nKL divergence and top-1 agreement against {comparison.models[0]}; near-ties are tokens where "
            f"its two best are less than {NEAR_TIE} nats apart"
        )
    table = rows_by_name(title, [bucket_name(result, n) for result in comparison.of(comparison.models[0])])
    others = comparison.models[1:]
    sections: list[tuple[str, tuple[str, ...], Callable[[BucketResult], str]]] = [
        ("perplexity", comparison.models, lambda r: with_error(r.perplexity, r.perplexity_stderr, ".2f")),
        (
            "its change",
            others,
            lambda r: with_error(r.perplexity_change, r.perplexity_change_stderr, "+.2%"),
        ),
        ("bits per byte", comparison.models, lambda r: with_error(r.bits_per_byte, r.bits_per_byte_stderr, ".3f")),
        ("KL, nats/token", others, lambda r: divergence(r.kl, r.kl_stderr)),
        ("top-1 agreement", others, lambda r: with_error(r.top1, r.top1_stderr, ".1%")),
        ("the same but for near-ties", others, lambda r: with_error(r.top1_clear, r.top1_clear_stderr, ".2%")),
        ("share of near-ties", comparison.models[:1] if others else (), lambda r: f"{r.near_ties:.1%}"),
    ]
    for heading, models, cell in sections:
        if not models:
            continue
        table.add_row(f"[bold]{heading}")
        for model in models:
            table.add_row(Text(f"  {model}"), *(cell(result) for result in comparison.of(model)))
        table.add_section()
    return table


def sensitivity_table(results: Sequence[Sensitivity]) -> Table:
    """Lay sensitivities out as a row for each weight, its divergence and bytes for each format."""
    formats = list(dict.fromkeys(result.format for result in results))
    table = Table(title="KL divergence to float32 of one weight quantized, nats per token, ± standard error; bytes")
    table.add_column("weight", no_wrap=True)
    for name in formats:
        table.add_column(name, justify="right", no_wrap=True)
    for weight in dict.fromkeys(result.weight for result in results):
        by_format = {result.format: result for result in results if result.weight == weight}
        cells = [_sensitivity_cell(by_format.get(name)) for name in formats]
        table.add_row(Text(weight), *cells)
    return table


def _sensitivity_cell(result: Sensitivity | None) -> str:
    if result is None:
        return ""
    return f"{divergence(result.kl, result.kl_stderr)}  {result.bytes:>9,}"
