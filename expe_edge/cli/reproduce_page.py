"""The report of a study as pages: sections of a table and a plot, in HTML that needs no other file, and in Markdown."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from expe_edge.cli.reproduce_plots import plot_gains, plot_losses, plot_trade_off, plot_training
from expe_edge.cli.tables import with_error
from expe_edge.study.plan import directory_of

Report = Mapping[str, Any]

#: A difference farther from zero than so many standard errors is marked.
ERRORS_APART = 2
#: Folder of the plots that the Markdown shows, beside it.
PLOTS = "plots"


@dataclass(frozen=True)
class Section:
    """A table, its first column the names of its rows, and a plot; either may be missing.

    plot: an SVG image.
    """

    title: str
    text: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    plot: bytes | None = None

    @property
    def file(self) -> str:
        """Name of the plot's file."""
        return f"{directory_of(self.title.lower())}.svg"


def write_pages(report: Report, sections: Sequence[Section], out: Path) -> list[Path]:
    """Write report.html, report.md and the plots that the latter shows; return the two pages."""
    (out / PLOTS).mkdir(exist_ok=True)
    for section in sections:
        if section.plot is not None:
            (out / PLOTS / section.file).write_bytes(section.plot)
    pages = []
    for kind, escaped in (("html", True), ("md", False)):
        environment = jinja2.Environment(autoescape=escaped, trim_blocks=True, lstrip_blocks=True)  # noqa: S701
        environment.filters |= {"base64": lambda data: base64.b64encode(data).decode(), "cell": _markdown_cell}
        template = Path(__file__).with_name(f"reproduce.{kind}.jinja").read_text(encoding="utf-8")
        pages.append(out / f"report.{kind}")
        page = environment.from_string(template).render(report=report, sections=sections, plots=PLOTS)
        pages[-1].write_text(page, encoding="utf-8")
    return pages


def _markdown_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")


def sections_of(report: Report) -> list[Section]:
    """Return the sections of a report; those of what it does not hold are left out."""
    parts = (_losses, _training, _probes, _trade_off, _training_cost, _inference_cost)
    return [section for part in parts for section in part(report)]


def _losses(report: Report) -> Iterator[Section]:
    """Yield loss by length of the named variants, then of each base and its ablations."""
    scored, base_of = list(report["nll"]), report["base"]
    groups = [("Loss by length", report["against"], [name for name in scored if name not in base_of])]
    for base in dict.fromkeys(base_of.values()):
        derived = [name for name in scored if base_of.get(name) == base]
        groups.append((f"Ablations of {base}", base, [name for name in scored if name == base] + derived))
    for title, other, names in groups:
        text = (
            f"Nats per token by position in a document, mean over seeds and {report['documents']} documents; in "
            f"brackets the difference to {other}, paired by document and seed, ± standard error; "
            f"* more than {ERRORS_APART} standard errors from zero."
        )
        rows = tuple((name, *_loss_cells(report, name, name != other)) for name in names)
        columns = tuple(f"{begin}–{end} N" for begin, end in pairwise([0, *report["lengths"]]))
        if rows:
            yield Section(title, text, columns, rows, plot_losses(report, names, other))


def _loss_cells(report: Report, name: str, differs: bool) -> Iterator[str]:
    means = np.mean(report["nll"][name], axis=0)
    if not differs or name not in report["difference"]:
        yield from (f"{loss:.3f}" for loss in means)
        return
    for loss, difference, error in zip(
        means, report["difference"][name], report["difference_stderr"][name], strict=True
    ):
        mark = "*" if abs(difference) > ERRORS_APART * error else ""
        yield f"{loss:.3f} ({with_error(difference, error, '+.3f')}){mark}"


def _training(report: Report) -> Iterator[Section]:
    trained = [run for run in report["runs"] if "history" in run]
    if not trained:
        return
    rows = []
    for name in dict.fromkeys(run["variant"] for run in trained):
        runs = [run for run in trained if run["variant"] == name]
        last = [run["history"][-1][1] for run in runs if run["history"]]
        rows.append((name, f"{runs[0]['parameters']:,}", str(len(runs)), f"{np.mean(last):.3f}" if last else ""))
    text = "The last reported loss is that of a few batches, mean over seeds; the plot has the mean over seeds by step."
    yield Section("Training", text, ("parameters", "seeds", "last loss"), tuple(rows), plot_training(trained))


def _probes(report: Report) -> Iterator[Section]:
    n = report["training_length"]
    for probe in dict.fromkeys(result["probe"] for result in report["probes"]):
        results = [result for result in report["probes"] if result["probe"] == probe]
        lengths = sorted({result["length"] for result in results})
        rows = []
        for name in dict.fromkeys(result["variant"] for result in results):
            cells = {result["length"]: _gained(result) for result in results if result["variant"] == name}
            rows.append((name, *(cells.get(length, "") for length in lengths)))
        text = (
            "Nats per token gained by far text ± standard error, and for probes of recall the share of exact matches; "
            "mean over seeds and depths. See docs/probes.md."
        )
        columns = tuple(f"{length // n} N" for length in lengths)
        yield Section(f"Probe {probe}", text, columns, tuple(rows), plot_gains(report, results))


def _gained(result: Mapping[str, Any]) -> str:
    exact = result["exact_match"]
    gained = with_error(result["gained"], result["gained_stderr"], "+.3f")
    return gained if exact is None else f"{gained}, {exact:.0%}"


def _trade_off(report: Report) -> Iterator[Section]:
    results = report["trade_off"]
    if not results:
        return
    text = (
        "Mean loss over the ranges of positions beyond N, and mean gain of the probes of recall in texts longer than "
        "N, nats per token, with the share of exact matches. A model that forgets can predict well and recall nothing; "
        "left and up is better."
    )
    rows = tuple((r["variant"], f"{r['loss']:.3f}", f"{r['gained']:+.3f}", f"{r['exact_match']:.1%}") for r in results)
    yield Section("Recall against loss", text, ("loss", "gained", "exact match"), rows, plot_trade_off(results))


def _training_cost(report: Report) -> Iterator[Section]:
    speeds: dict[str, list[float]] = {}
    for run in report["runs"] if report["cost"] else ():
        if run.get("tokens_per_second"):
            speeds.setdefault(run["variant"], []).append(run["tokens_per_second"])
    if not speeds:
        return
    other = speeds.get(report["against"])
    rows = []
    for name, values in speeds.items():
        ratio = f"{np.median(values) / np.median(other):.2f}" if other else ""
        rows.append((name, f"{np.median(values):,.0f}", f"{min(values):,.0f}–{max(values):,.0f}", ratio))
    text = (
        "Tokens per second of a run, one thread, as the run has recorded it, checkpoints included; other runs may have "
        f"gone beside it. Median and range over seeds, and the median's ratio to {report['against']}."
    )
    yield Section("Cost of training", text, ("tokens/s", "range", "ratio"), tuple(rows))


def _inference_cost(report: Report) -> Iterator[Section]:
    other, n = report["against"], report["training_length"]
    for precision in dict.fromkeys(result["precision"] for result in report["cost"]):
        results = [result for result in report["cost"] if result["precision"] == precision]
        for what, title in (("prefill", "prefill"), ("step", "a decoding step")):
            names = results[0][what]
            rows = [(name, *(_time(result, what, name) for result in results)) for name in names]
            text = (
                f"Milliseconds, median of {len(next(iter(names.values())))} turns in which all variants go one after "
                f"the other, and the ratio to {other} in the same turn with its quartiles; one thread, "
                f"{results[0]['processor']}."
            )
            columns = tuple(f"{result['length'] // n} N" for result in results)
            yield Section(f"Time of {title}, {precision}", text, columns, tuple(rows))
        rows = [
            (
                name,
                f"{results[0]['package_bytes'][name]:,}",
                *(f"{result['cache_bytes'][name]:,}" for result in results),
            )
            for name in results[0]["cache_bytes"]
        ]
        columns = ("package", *(f"cache, {result['length'] // n} N" for result in results))
        yield Section(
            f"Memory, {precision}", "Bytes of the package, and of a cache for that length.", columns, tuple(rows)
        )


def _time(result: Mapping[str, Any], what: str, name: str) -> str:
    milliseconds = f"{1e3 * np.median(result[what][name]):.3g}"
    if name not in result.get(f"{what}_ratio", {}):
        return milliseconds
    low, middle, high = result[f"{what}_ratio"][name]
    return f"{milliseconds} (×{middle:.2f}, {low:.2f}–{high:.2f})"
