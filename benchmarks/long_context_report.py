"""What `benchmarks.long_context` has measured, as a table in Markdown, a plot, and plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.long_context_records import Records, Settings, between, digest_of, run_of
from expe_edge.cli.plots import drawing, scale_by_length
from expe_edge.cli.tables import short
from expe_edge.divergence import ratio_of_sums
from expe_edge.quality.recall import Recall
from expe_edge.quality.scoring import Ids, PackageScorer
from expe_edge.results import Result
from expe_edge.runtime.memory import PREFILL_CHUNK
from expe_edge.speed.measuring import quartiles


@dataclass(frozen=True)
class Row(Result):
    """One package between two lengths.

    perplexity, kl, top1: over tokens, with standard errors over texts; see `BucketResult`. seconds: median over texts
    of all runs over many tokens from the text's beginning to `end`. tokens_per_second: of the median chunk between
    `begin` and `end`. decode_ms: median of the tokens read one by one before `end`. Ratios: quartiles of the time over
    the first package's, chunk by chunk and token by token. Bytes: size of the package; opened and peak of its process,
    before it reads and at most; of that cache, of all tokens to `end`, and bias, which one run adds to its attention
    scores, (H, chunk, end) float32.
    """

    package: str
    training_length: int
    begin: int
    end: int
    texts: int
    perplexity: float
    perplexity_stderr: float
    kl: float
    kl_stderr: float
    top1: float
    seconds: float
    tokens_per_second: float
    prefill_ratio: list[float]
    decode_ms: float
    decode_ratio: list[float]
    size: int
    opened: int
    peak: int
    cache: int
    bias: int


def summarize(
    names: Sequence[str], scorers: Sequence[PackageScorer], texts: Sequence[Ids], settings: Settings, records: Records
) -> list[Row]:
    """Reduce what is recorded of each package and length to a row."""
    rows = []
    for name, scorer in zip(names, scorers, strict=True):
        reading = records.reading.get(run_of(scorer, scorers[0], settings), {})
        of_texts = [reading.get(digest_of(text), {}) for text in texts]
        for number, (begin, end) in enumerate(settings.steps, start=1):
            until = [between(*step) for step in settings.steps[:number]]
            whole = [[found[step] for step in until] for found in of_texts if until[-1] in found]
            if whole:
                rows.append(_row(name, scorer, begin, end, whole, settings.chunk))
    return rows


def _row(
    name: str, scorer: PackageScorer, begin: int, end: int, whole: Sequence[list[dict[str, Any]]], chunk: int
) -> Row:
    """Reduce what a package made of texts, by length until `end`."""
    last = [of[-1] for of in whole]
    sums = {measure: np.array([of["sums"][measure] for of in last]) for measure in last[0]["sums"]}
    nll, nll_error = ratio_of_sums(sums["nll"], sums["tokens"])
    kl, kl_error = ratio_of_sums(sums["kl"], sums["tokens"])
    manifest = scorer.session.package.manifest

    def joined(field: str) -> list[float]:
        return [value for of in last for value in of[field]]

    return Row(
        package=name,
        training_length=scorer.training_length,
        begin=begin,
        end=end,
        texts=len(whole),
        perplexity=math.exp(nll),
        perplexity_stderr=math.exp(nll) * nll_error,
        kl=kl,
        kl_stderr=kl_error,
        top1=ratio_of_sums(sums["top1"], sums["tokens"])[0],
        seconds=float(np.median([sum(part["seconds"] for part in of) for of in whole])),
        tokens_per_second=float(PREFILL_CHUNK / np.median(joined("prefill"))),
        prefill_ratio=quartiles(joined("prefill_ratio")),
        decode_ms=float(1e3 * np.median(joined("decode"))),
        decode_ratio=quartiles(joined("decode_ratio")),
        size=scorer.session.package.size,
        opened=max(of["opened"] for of in last),
        peak=max(of["peak"] for of in last),
        cache=scorer.session.contract.cache_bytes * end,
        bias=4 * manifest.model["num_attention_heads"] * chunk * end,
    )


#: Sections of the report: heading, and what a cell says.
SECTIONS: dict[str, Callable[[Row], str]] = {
    "perplexity": lambda r: f"{r.perplexity:.3f}{_error(r.perplexity_stderr, '.3f')}",
    "KL, nats/token": lambda r: f"{short(r.kl, 1)}{_error(r.kl_stderr, '.1e')}",
    "top-1 agreement": lambda r: f"{r.top1:.2%}",
    "prefill, tokens/s": lambda r: f"{r.tokens_per_second:,.0f}",
    "prefill, its time over the first's": lambda r: _spread(r.prefill_ratio),
    "prefill of the whole text, s": lambda r: f"{r.seconds:.1f}",
    "decode, ms/token": lambda r: f"{r.decode_ms:.2f}",
    "decode, its time over the first's": lambda r: _spread(r.decode_ratio),
    "peak resident set, MB": lambda r: _megabytes(r.peak),
    "the same less what was held before reading": lambda r: _megabytes(r.peak - r.opened),
    "cache, MB": lambda r: _megabytes(r.cache),
}
#: Those that say nothing of the first package, which they compare with.
COMPARED = ("KL", "top-1", "prefill, its", "decode, its")


def _error(value: float, form: str) -> str:
    """Write a standard error, where more than one text gives one."""
    return "" if math.isnan(value) else f" ± {value:{form}}"


def _spread(quarters: Sequence[float]) -> str:
    return f"{quarters[1]:.2f} ({quarters[0]:.2f}–{quarters[2]:.2f})"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def write_report(out: Path, rows: Sequence[Row], recalls: Mapping[str, Sequence[Recall]], settings: Settings) -> str:
    """Write report.md and report.json into `out`; return the first's text."""
    text = table(rows, recalls, settings)
    data = {
        "settings": {"threads": settings.threads, "chunk": settings.chunk, "decoded": settings.decoded},
        "rows": [row.to_dict() for row in rows],
        "recall": [{**r.to_dict(), "model": package} for package, of in recalls.items() for r in of],
    }
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "report.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return text


def table(rows: Sequence[Row], recalls: Mapping[str, Sequence[Recall]], settings: Settings) -> str:
    """Lay out a section for each figure, a row for each package and a column for each length, in Markdown."""
    packages = list(dict.fromkeys(row.package for row in rows))
    sections: dict[str, dict[str, dict[int, str]]] = {}  # heading, package, length
    for heading, cell in SECTIONS.items():
        shown = packages[heading.startswith(COMPARED) :]
        sections[heading] = {name: {r.end: cell(r) for r in rows if r.package == name} for name in shown}
    sections["attention bias of a run, MB"] = {"all": {r.end: _megabytes(r.bias) for r in rows}}
    for package, of in recalls.items():
        for r in of:
            heading = f"{r.probe} at {r.depth:.0%}: exact match, nats gained per token"
            cells = sections.setdefault(heading, {}).setdefault(package, {})
            cells[r.length] = f"{r.exact_match:.0%} {r.gained:+.2f}{_error(r.gained_stderr, '.2f')}"
    lines = [
        f"{max(row.texts for row in rows)} texts, {settings.threads} threads, runs of {settings.chunk} tokens. A "
        "column is of the tokens from the length before it to its own; ± standard error over texts; ratios: median "
        "(quartiles).",
        "",
        _line("", [f"{length:,}" for length in settings.lengths]),
        "|---" * (len(settings.lengths) + 1) + "|",
    ]
    for heading, section in sections.items():
        lines.append(_line(f"**{heading}**", [""] * len(settings.lengths)))
        lines += [_line(name, [of.get(end, "–") for end in settings.lengths]) for name, of in section.items()]
    return "\n".join(lines) + "\n"


def _line(name: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([name, *cells])} |"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw perplexity, divergence, speed and memory by length."""
    panels: list[tuple[str, str, Callable[[Row], float]]] = [
        ("perplexity", "linear", lambda r: r.perplexity),
        ("KL to the first, nats/token", "log", lambda r: r.kl),
        ("prefill, tokens/s", "log", lambda r: r.tokens_per_second),
        ("decode, ms/token", "log", lambda r: r.decode_ms),
        ("peak resident set, MB", "log", lambda r: r.peak / 1e6),
    ]
    pyplot = drawing()
    figure, every = pyplot.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.4), layout="constrained")
    packages = list(dict.fromkeys(row.package for row in rows))
    for axes, (title, scale, value) in zip(every, panels, strict=True):
        for number, package in enumerate(packages):
            points = [(row.end, value(row)) for row in rows if row.package == package and value(row) > 0]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", color=f"C{number}", label=package)
        axes.set(title=title, yscale=scale, xlabel="length, tokens")
        scale_by_length(axes, rows[0].training_length)
    every[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
