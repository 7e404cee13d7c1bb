"""Results of `analyze` as a plot in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expe_edge.cli.plots import draw_heat_map, panels, save_panels
from expe_edge.quality.analysis import AnalysisReport, HeadReach, HeadSlopes, ModelAnalysis

#: Where the axes of slopes and of R² turn from a linear to a logarithmic scale.
SMALL_SLOPE, SMALL_R2 = 1e-3, 1.0


def plot_analysis(report: AnalysisReport, path: Path) -> None:
    """Draw into `path` position and variance of all models by layer, and below a row of panels for each model."""
    figure, grid = panels(1 + len(report.models), 3)
    within, beyond, share = grid[0]
    for number, model in enumerate(report.models):
        _draw_positions(model, f"C{number}", within, beyond)
        _draw_shares(model, f"C{number}", share)
    within.set(title="position read off the residual stream, within N", ylabel="R²")
    beyond.set(title="the same beyond N, fitted within N", ylabel="R²")
    share.set(title="variance in the first l dimensions", ylabel="share of all")
    if report.length > report.training_length:
        beyond.set_yscale("symlog", linthresh=SMALL_R2)
    for axes in grid[0]:
        _label_layers(axes)
        axes.grid(alpha=0.3)
    for axes in (within, share):
        if axes.has_data():
            axes.legend(fontsize=7)
    slopes = [slope for model in report.models for slope in model.slopes]
    longest = max(2, *(reach.reach_median for model in report.models for reach in model.reaches))
    widest = max(reach.entropy for model in report.models for reach in model.reaches)
    for (steepness, reach, entropy), model in zip(grid[1:], report.models, strict=True):
        if model.slopes:
            _draw_slopes(model, slopes, steepness)
        lengths = {_place(r): (max(1, r.reach_median), str(r.reach_median)) for r in model.reaches}
        draw_heat_map(lengths, reach, norm="log", vmin=1, vmax=longest)
        reach.set_title(f"{model.model}\nmedian reach, tokens", fontsize=9)
        draw_heat_map({_place(r): (r.entropy, f"{r.entropy:.1f}") for r in model.reaches}, entropy, vmin=0, vmax=widest)
        entropy.set_title(f"{model.model}\nentropy of attention, nats", fontsize=9)
        for axes in (reach, entropy):
            axes.set(xlabel="head", ylabel="layer")
    save_panels(figure, grid, path)


def _place(reach: HeadReach) -> tuple[str, str]:
    return str(reach.layer), str(reach.head)


def _draw_positions(model: ModelAnalysis, colour: str, within: Any, beyond: Any) -> None:
    layers = [probe.layer for probe in model.positions]
    style = {"marker": "o", "color": colour}
    within.plot(layers, [probe.position_within for probe in model.positions], label=f"{model.model}, n", **style)
    beyond.plot(layers, [probe.position_beyond for probe in model.positions], label=f"{model.model}, n", **style)
    style |= {"linestyle": "--", "label": f"{model.model}, log n"}
    within.plot(layers, [probe.log_position_within for probe in model.positions], **style)
    beyond.plot(layers, [probe.log_position_beyond for probe in model.positions], **style)


def _draw_shares(model: ModelAnalysis, colour: str, axes: Any) -> None:
    """Draw the shares of a model that overrides dimensions, with a line at the share expected by chance."""
    if not model.dims:
        return
    for place, line in (("residual", "-"), ("normed", "--")):
        spreads = [spread for spread in model.spreads if spread.place == place]
        layers, shares = [spread.layer for spread in spreads], [spread.share for spread in spreads]
        axes.plot(layers, shares, line, marker="o", color=colour, label=f"{model.model}, {place}")
    axes.axhline(model.spreads[0].chance, color=colour, linewidth=1, linestyle=":")


def _draw_slopes(model: ModelAnalysis, every: Sequence[HeadSlopes], axes: Any) -> None:
    """Draw each head's distribution as a line from 5 to 95 %, thick from 25 to 75 %, with a dot at the median.

    every: slopes of all models, which have one scale.
    """
    heads = max(slope.head for slope in model.slopes)
    limbs = 1 + max(slope.limb or 0 for slope in model.slopes)
    for slope in model.slopes:
        place = slope.layer + ((slope.head - 1) * limbs + (slope.limb or 0) + 0.5) / (heads * limbs) * 0.8 - 0.4
        low, lower, median, upper, high = slope.quantiles
        colour = f"C{(slope.head - 1) % 10}"
        axes.plot([place, place], [low, high], color=colour, linewidth=1)
        axes.plot([place, place], [lower, upper], color=colour, linewidth=3)
        axes.plot(place, median, "o", color=colour, markersize=3)
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_yscale("symlog", linthresh=SMALL_SLOPE)
    lowest, highest = (pick(slope.quantiles[end] for slope in every) for pick, end in ((min, 0), (max, -1)))
    axes.set_ylim(2 * min(lowest, -SMALL_SLOPE / 4), 2 * max(highest, SMALL_SLOPE / 4))
    axes.set_title(f"{model.model}\nslopes by layer, heads side by side", fontsize=9)
    axes.set_ylabel("nats per token")
    _label_layers(axes)
    axes.grid(axis="y", alpha=0.3)


def _label_layers(axes: Any) -> None:
    axes.set_xlabel("layer")
    axes.locator_params(axis="x", integer=True)
