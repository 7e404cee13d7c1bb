"""Puts measured tables into the README, docs/quantization.md and docs/reproduce.md, between their markers.

    python -m docs.tables demo/comparison.json runs/encodings/report.json runs/quantization/results.json

The first file is written by `make demo`, the others by `expe-edge reproduce studies/encodings.yaml` and
`python -m benchmarks.quantization`; any of them may be left out. Results of the last on several models are told apart
by their training length.
"""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from expe_edge.cli.tables import with_error

README = Path(__file__).parent.parent / "README.md"
QUANTIZATION = Path(__file__).parent / "quantization.md"
STUDIES = Path(__file__).parent / "reproduce.md"

#: What a benchmark has written, as JSON has it.
Report = dict[str, Any]


def quality_table(comparison: Report) -> str:
    """Perplexity of the reference, then KL divergence of the others."""
    results = {model: [r for r in comparison["results"] if r["model"] == model] for model in comparison["models"]}
    reference, *others = comparison["models"]
    n = comparison["training_length"]
    rows = [row("position", [f"{r['bucket_start'] // n}–{r['bucket_end'] // n} N" for r in results[reference]])]
    rows.append("|---" * (len(results[reference]) + 1) + "|")
    cells = [with_error(r["perplexity"], r["perplexity_stderr"], ".2f") for r in results[reference]]
    rows.append(row(f"**perplexity**, {reference}", cells))
    rows += [
        row(f"**KL**, {model}", [with_error(r["kl"], r["kl_stderr"], ".5f") for r in results[model]])
        for model in others
    ]
    return "\n".join(rows)


#: Variants of `studies/encodings.yaml` that the page shows.
SHOWN = ("alibi", "expe", "expe, paper", "expe, paper, offsets", "rotary", "sinusoidal")


def extrapolation_table(report: Report) -> str:
    """Loss by length of the variants in `SHOWN`, mean over seeds, and the paired difference ± standard error to one."""
    rows = [
        row("position", [f"{a}–{b} N" for a, b in pairwise([0, *report["lengths"]])]),
        "|---" * (len(report["lengths"]) + 1) + "|",
    ]
    for variant in SHOWN:
        cells = [f"{loss:.3f}" for loss in np.mean(report["nll"][variant], axis=0)]
        if variant != report["against"]:
            means, errors = (report[name][variant] for name in ("difference", "difference_stderr"))
            cells = [f"{c} ({with_error(m, e, '+.3f')})" for c, m, e in zip(cells, means, errors, strict=True)]
        rows.append(row(variant, cells))
    return "\n".join(rows)


def formats_table(report: Report) -> str:
    """Every package's worst bucket, against float32."""
    heading = ("package", "KL, nats/token", "last bucket / first", "perplexity", "size", "top-1", "without near-ties")
    rows = [row(heading[0], list(heading[1:])), "|---" * len(heading) + "|"]
    for one in report["rows"]:
        cells = [
            f"{one['worst_kl']:.2g}",
            f"{one['flatness']:.2f}",
            with_error(one["perplexity"], one["perplexity_stderr"], "+.2%"),
            f"{one['size']:.3f}",
            f"{one['top1']:.1%}",
            f"{one['top1_clear']:.2%}",
        ]
        rows.append(row(one["package"], cells))
    return "\n".join(rows)


#: Packages with float32 weights and an int8 cache, and what is in it.
CACHES = {
    "folded/float32-int8-cache": "position-free keys",
    "positioned-keys/float32-int8-cache": "keys that carry their positions",
}


def cache_table(comparison: Report) -> str:
    """KL divergence by length of float32 weights with an int8 cache, keys with and without their positions."""
    n = comparison["training_length"]
    rows: list[str] = []
    for model, name in CACHES.items():
        results = [result for result in comparison["results"] if result["model"] == model]
        if not rows:
            rows.append(row("KL, nats/token", [f"{r['bucket_start'] // n}–{r['bucket_end'] // n} N" for r in results]))
            rows.append("|---" * (len(results) + 1) + "|")
        rows.append(row(name, [f"{result['kl']:.2g}" for result in results]))
    return "\n".join(rows)


def row(name: str, cells: list[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join([name, *cells]) + " |"


def fill(page: Path, marker: str, content: str) -> None:
    """Replace what stands between the two comments named `marker` of `page`."""
    pattern = rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)"
    text = page.read_text(encoding="utf-8")
    filled, count = re.subn(pattern, lambda match: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{page.name} has no pair of markers {marker!r}")
    page.write_text(filled, encoding="utf-8")


def fill_from(report: Report) -> None:
    """Fill the tables of one report, told by its keys from the others."""
    if "nll" in report:
        fill(STUDIES, "extrapolation", extrapolation_table(report))
    elif "comparison" in report:
        comparison = report["comparison"]
        fill(QUANTIZATION, f"formats, N = {comparison['training_length']}", formats_table(report))
        if set(CACHES) <= set(comparison["models"]):
            fill(QUANTIZATION, "cache", cache_table(comparison))
    else:
        fill(README, "quality", quality_table(report))


if __name__ == "__main__":
    for file in sys.argv[1:]:
        fill_from(json.loads(Path(file).read_text(encoding="utf-8")))
