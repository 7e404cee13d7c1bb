"""Results of `reproduce` as SVG images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from expe_edge.cli.plots import drawing, scale_by_length

Report = Mapping[str, Any]


def plot_losses(report: Report, names: Sequence[str], other: str) -> bytes:
    """Draw loss by length, and its difference to that of `other` with standard errors."""
    pyplot = drawing()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    ends = [end * report["training_length"] for end in report["lengths"]]
    for index, name in enumerate(names):
        style = _style(index)
        left.plot(ends, np.mean(report["nll"][name], axis=0), label=name, **style)
        if name != other and name in report["difference"]:
            errors = np.nan_to_num(np.array(report["difference_stderr"][name], dtype=float))
            right.errorbar(ends, report["difference"][name], errors, capsize=3, label=name, **style)
    left.set(title="loss by length", ylabel="nats per token")
    right.set(title=f"difference to {other} ± standard error", ylabel="nats per token")
    right.axhline(0, color="grey", linewidth=1)
    for axes in (left, right):
        axes.set_xlabel("position, tokens (the end of its range)")
        scale_by_length(axes, report["training_length"])
    left.legend(fontsize=7)
    return _image(figure)


def plot_training(runs: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw the training loss of every variant, mean over seeds, by step."""
    figure, axes = drawing().subplots(figsize=(7, 4.2), layout="constrained")
    for index, name in enumerate(dict.fromkeys(run["variant"] for run in runs)):
        losses: dict[int, list[float]] = {}
        for run in runs:
            for step, loss in run["history"] if run["variant"] == name else ():
                losses.setdefault(step, []).append(loss)
        steps = sorted(losses)
        style = {**_style(index), "marker": ""}
        axes.plot(steps, [np.mean(losses[step]) for step in steps], label=name, **style)
    axes.set(title="training loss", xlabel="step", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return _image(figure)


def plot_gains(report: Report, results: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw what one probe has gained by length, a line for each variant."""
    figure, axes = drawing().subplots(figsize=(7, 4.2), layout="constrained")
    for index, name in enumerate(dict.fromkeys(result["variant"] for result in results)):
        own = [result for result in results if result["variant"] == name]
        errors = [result["gained_stderr"] or 0 for result in own]
        lengths, gained = ([result[key] for result in own] for key in ("length", "gained"))
        axes.errorbar(lengths, gained, errors, capsize=3, label=name, **_style(index))
    axes.axhline(0, color="grey", linewidth=1)
    axes.set(title=f"{results[0]['probe']}: gained", xlabel="length, tokens", ylabel="nats per token")
    scale_by_length(axes, report["training_length"])
    axes.legend(fontsize=7)
    return _image(figure)


def plot_trade_off(results: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw what each variant recalls against how it predicts, a named point each."""
    figure, axes = drawing().subplots(figsize=(7, 4.2), layout="constrained")
    for result in results:
        point = (result["loss"], result["gained"])
        axes.plot(*point, color="C0", marker="o")
        axes.annotate(result["variant"], point, xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.axhline(0, color="grey", linewidth=1)
    axes.margins(x=0.2, y=0.1)  # room for names
    axes.set(title="recall against loss, beyond N", xlabel="loss, nats per token", ylabel="gained, nats per token")
    axes.grid(alpha=0.3)
    return _image(figure)


def _style(index: int) -> dict[str, Any]:
    """Return a line's colour, and another kind of line for every ten, which is as many colours as there are."""
    return {
        "color": f"C{index % 10}",
        "linestyle": ("-", "--", ":", "-.")[index // 10 % 4],
        "marker": "o",
        "markersize": 4,
    }


def _image(figure: Any) -> bytes:
    """Return a figure as SVG, the same for the same figure, and close it."""
    data = io.BytesIO()
    with drawing().rc_context({"svg.hashsalt": "expe-edge"}):
        figure.savefig(data, format="svg", metadata={"Date": None})
    drawing().close(figure)
    return data.getvalue()
