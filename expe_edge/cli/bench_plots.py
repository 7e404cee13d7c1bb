"""What `bench` measured, drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from expe_edge.cli.plots import panels, save_panels
from expe_edge.speed.bench import BenchResult, DepthResult


def plot_bench(result: BenchResult, path: Path) -> None:
    """Draw prefill, decode, memory and the share of the read bandwidth against depth into `path`."""
    figure, axes = panels(2, 2)
    measures: list[tuple[str, str, Callable[[DepthResult], list[float]]]] = [
        ("prefill", "tokens/s", lambda r: r.prefill),
        ("decode", "tokens/s", lambda r: r.decode),
        ("peak memory", "MB", lambda r: [r.peak_bytes / 1e6] * 3),
        ("decode, share of the read bandwidth", "", lambda r: r.read_share),
    ]
    depths = sorted({each.depth for each in result.depths})
    for of in result.opened:
        rows = [each for each in result.depths if (each.package, each.threads) == (of.package, of.threads)]
        for axis, (_, _, values) in zip(axes.flat, measures, strict=True):
            low, middle, high = zip(*(values(row) for row in rows), strict=True)
            places = [depths.index(row.depth) for row in rows]
            axis.plot(places, middle, marker="o", label=f"{of.package}, {of.threads} threads")
            axis.fill_between(places, low, high, alpha=0.2)
    for axis, (title, unit, _) in zip(axes.flat, measures, strict=True):
        axis.set(title=title, ylabel=unit, xlabel="tokens in the cache", ylim=(0, None))
        axis.set_xticks(range(len(depths)), [f"{depth:,}" for depth in depths])
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    save_panels(figure, axes, path)
