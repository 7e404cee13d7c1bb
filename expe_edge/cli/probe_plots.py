"""Results of `probe` as a plot in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expe_edge.cli.plots import draw_heat_map, panels, save_panels, scale_by_length
from expe_edge.quality.context_use import ContextUse
from expe_edge.quality.definitions import CODE_DEFINITION
from expe_edge.quality.loss_by_position import PositionLoss
from expe_edge.quality.probing import ProbeReport
from expe_edge.quality.recall import Recall


def plot_probes(report: ProbeReport, path: Path) -> None:
    """Draw into `path` curves by length in a row, and below a heat map of recall for each model and probe."""
    curves = [(draw, results) for draw, results in _curves(report) if results]
    probes = [probe for probe in dict.fromkeys(r.probe for r in report.recall) if probe != CODE_DEFINITION]
    rows = bool(curves) + len(report.models) * bool(probes)
    columns = max(len(curves), len(probes))
    figure, grid = panels(rows, columns)
    for axes, (draw, results) in zip(grid[0], curves, strict=False):
        draw(report, results, axes)
    for column, probe in enumerate(probes):
        of_probe = [r for r in report.recall if r.probe == probe]
        most = max(1e-3, *(r.gained for r in of_probe))  # one scale for all models
        for axes, model in zip(grid[bool(curves) :, column], report.models, strict=True):
            _draw_heat_map([r for r in of_probe if r.model == model], most, report.training_length, axes)
    save_panels(figure, grid, path)


def _curves(report: ProbeReport) -> list[tuple[Any, Sequence[Any]]]:
    """Return what draws each kind of curve, and the results that it draws."""
    return [
        (_draw_context_use, report.context_use),
        (_draw_losses, report.loss_by_position),
        (_draw_definitions, [r for r in report.recall if r.probe == CODE_DEFINITION]),
    ]


def _draw_context_use(report: ProbeReport, results: Sequence[ContextUse], axes: Any) -> None:
    _draw_gains(report, results, axes)
    _label(report, "context use: gained by far text", "length, tokens", axes)


def _draw_definitions(report: ProbeReport, results: Sequence[Recall], axes: Any) -> None:
    _draw_gains(report, results, axes)
    _label(report, f"{CODE_DEFINITION}: gained by the definition", "distance at most, tokens", axes)


def _draw_gains(report: ProbeReport, results: Sequence[ContextUse | Recall], axes: Any) -> None:
    for model in report.models:
        _draw_curve([(r.length, r.gained, r.gained_stderr) for r in results if r.model == model], model, axes)
    axes.axhline(0, color="grey", linewidth=1)


def _draw_losses(report: ProbeReport, results: Sequence[PositionLoss], axes: Any) -> None:
    for model in report.models:
        _draw_curve([(r.bin_end, r.loss, r.loss_stderr) for r in results if r.model == model], model, axes)
    _label(report, "loss by position", "position, tokens", axes)


def _draw_curve(points: Sequence[tuple[float, float, float]], model: str, axes: Any) -> None:
    places, values, errors = zip(*points, strict=True)
    axes.errorbar(places, values, np.nan_to_num(errors), marker="o", capsize=3, label=model)


def _label(report: ProbeReport, title: str, across: str, axes: Any) -> None:
    axes.set(title=title, xlabel=across, ylabel="nats per token")
    scale_by_length(axes, report.training_length)
    axes.legend(fontsize=8)


def _draw_heat_map(results: Sequence[Recall], most: float, training_length: int, axes: Any) -> None:
    """Draw nats gained as colour, up to `most`, and both figures as text; depths downwards, lengths to the right."""
    cells = {
        (f"{r.depth:.0%}", f"{r.length // training_length} N"): (r.gained, f"{r.gained:+.1f}\n{r.exact_match:.0%}")
        for r in results
    }
    draw_heat_map(cells, axes, vmin=0, vmax=most)
    axes.set_title(f"{results[0].probe}, {results[0].model}\nnats gained per token; exact match", fontsize=9)
