"""Results as plots in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expe_edge.quality.comparison import Comparison

if TYPE_CHECKING:
    from expe_edge.calibration.sensitivity import Sensitivity

#: Inches of a panel among several.
WIDTH, HEIGHT = 4.2, 3.4


def drawing() -> Any:
    """Return matplotlib.pyplot, which takes a second to import, drawing into files alone."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def scale_by_length(axes: Any, training_length: int) -> None:
    """Let axes show tokens to the right by octaves, with a line at the training length."""
    axes.set_xscale("log", base=2)
    axes.axvline(training_length, color="grey", linewidth=1, linestyle=":")
    axes.grid(alpha=0.3)


def panels(rows: int, columns: int) -> tuple[Any, Any]:
    """Return a figure and its axes, (rows, columns)."""
    size = (WIDTH * columns, HEIGHT * rows)
    figure, axes = drawing().subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    return figure, axes


def save_panels(figure: Any, axes: Any, path: Path) -> None:
    """Write a figure of `panels` without those that were left empty."""
    for each in axes.flat:
        each.set_visible(each.has_data())
    figure.savefig(path, dpi=120)
    drawing().close(figure)


def draw_heat_map(cells: Mapping[tuple[str, str], tuple[float, str]], axes: Any, **scale: Any) -> None:
    """Draw values as colours with texts on them: (row, column) to both, in their order downwards and to the right.

    scale: `vmin`, `vmax` and, where it is not linear, `norm` of matplotlib's `imshow`.
    """
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    values = [[cells.get((row, column), (float("nan"), ""))[0] for column in columns] for row in rows]
    image = axes.imshow(values, cmap="viridis", aspect="auto", **scale)
    for (row, column), (value, text) in cells.items():
        colour = "black" if image.norm(value) > 0.5 else "white"
        place = columns.index(column), rows.index(row)
        axes.text(*place, text, color=colour, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Draw perplexity and KL divergence against length, with standard errors, into `path`."""
    pyplot = drawing()
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
        axes.set_xlabel(f"position, tokens (training length {comparison.training_length})")
        scale_by_length(axes, comparison.training_length)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_sensitivity(results: Sequence[Sensitivity], path: Path) -> None:
    """Draw a bar for each weight and format into `path`."""
    pyplot = drawing()
    weights = list(dict.fromkeys(result.weight for result in results))
    formats = list(dict.fromkeys(result.format for result in results))
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.28 * len(weights)), layout="constrained")
    height = 0.8 / len(formats)
    for index, name in enumerate(formats):
        matching = [result for result in results if result.format == name]
        places = [weights.index(result.weight) + (index - (len(formats) - 1) / 2) * height for result in matching]
        axes.barh(places, [result.kl for result in matching], height, label=name)
    axes.set_yticks(range(len(weights)), weights, fontsize=8)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="KL divergence to float32 with this weight alone quantized, nats per token")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
