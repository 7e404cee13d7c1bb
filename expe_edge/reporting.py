"""Results for people: tables on a terminal, plots in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from expe_edge.comparison import BucketResult, Comparison


def print_whole(table: Table, console: Console) -> None:
    """Print `table` with no name and no figure cut: a terminal that is too narrow breaks its lines instead."""
    console.width = max(console.width, Console(width=10_000).measure(table).maximum)
    console.print(table)


def bucket_name(result: BucketResult, training_length: int) -> str:
    """Name a bucket by the positions it holds, in training lengths N."""
    return f"{result.bucket_start // training_length}–{result.bucket_end // training_length} N"


def short(value: float, digits: int) -> str:
    """Write a small number in scientific notation without padding its exponent: 3.8e-4."""
    return f"{value:.{digits}e}".replace("e-0", "e-").replace("e+0", "e")


def comparison_table(comparison: Comparison) -> Table:
    """Lay a comparison out as a section for each measure, a row for each model, a column for each bucket."""
    n = comparison.training_length
    title = f"Quality by position, N = {n} tokens, {comparison.results[0].documents} documents, ± standard error"
    if len(comparison.models) > 1:
        title += f"\nKL divergence and top-1 agreement against {comparison.models[0]}"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for result in comparison.of(comparison.models[0]):
        table.add_column(bucket_name(result, n), justify="right", no_wrap=True)
    others = comparison.models[1:]
    sections: list[tuple[str, tuple[str, ...], Callable[[BucketResult], str]]] = [
        ("perplexity", comparison.models, lambda r: f"{r.perplexity:.2f} ±{r.perplexity_stderr:.2f}"),
        ("bits per byte", comparison.models, lambda r: f"{r.bits_per_byte:.3f} ±{r.bits_per_byte_stderr:.3f}"),
        ("KL, nats/token", others, lambda r: f"{short(r.kl, 1)} ±{short(r.kl_stderr, 0)}"),
        ("top-1 agreement", others, lambda r: f"{r.top1:.1%} ±{r.top1_stderr:.1%}"),
    ]
    for heading, models, cell in sections:
        if not models:
            continue
        table.add_row(f"[bold]{heading}")
        for model in models:
            table.add_row(f"  {model}", *(cell(result) for result in comparison.of(model)))
        table.add_section()
    return table


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Draw perplexity and KL divergence against length, with standard errors, into `path`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    reference = comparison.models[0]
    for model in comparison.models:
        results = comparison.of(model)
        ends = [result.bucket_end for result in results]
        style = {"marker": "o", "capsize": 3, "linestyle": "-" if model == reference else "--"}
        values, errors = zip(*((r.perplexity, r.perplexity_stderr) for r in results), strict=True)
        left.errorbar(ends, values, errors, label=model, **style)
        if model != reference:
            values, errors = zip(*((r.kl, r.kl_stderr) for r in results), strict=True)
            right.errorbar(ends, values, errors, label=model, color=left.containers[-1].lines[0].get_color(), **style)
    left.set(title="perplexity", ylabel="perplexity per token")
    right.set(title=f"KL divergence to {reference}", ylabel="nats per token", yscale="log")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel(f"position, tokens (training length {comparison.training_length})")
        axes.axvline(comparison.training_length, color="grey", linewidth=1, linestyle=":")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
