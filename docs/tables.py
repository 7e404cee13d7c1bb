"""Puts measured tables into the README, between its markers.

    python -m docs.tables demo/comparison.json runs/extrapolation/results.json

The first file is written by `make demo`, the second by `python -m benchmarks.extrapolation`.
"""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

README = Path(__file__).parent.parent / "README.md"


def quality_table(comparison: dict) -> str:
    """Perplexity of the reference, then KL divergence, top-1 agreement and change of perplexity of the others."""
    results = {model: [r for r in comparison["results"] if r["model"] == model] for model in comparison["models"]}
    reference, *others = comparison["models"]
    n = comparison["training_length"]
    rows = [row("position", [f"{r['bucket_start'] // n}–{r['bucket_end'] // n} N" for r in results[reference]])]
    rows.append("|---" * (len(results[reference]) + 1) + "|")
    cells = [f"{r['perplexity']:.2f} ± {r['perplexity_stderr']:.2f}" for r in results[reference]]
    rows.append(row(f"**perplexity**, {reference}", cells))
    for model in others:
        pairs = zip(results[model], results[reference], strict=True)
        rows.append(row(f"change, {model}", [f"{r['perplexity'] / base['perplexity'] - 1:+.2%}" for r, base in pairs]))
    for model in others:
        cells = [f"{r['kl']:.5f} ± {r['kl_stderr']:.5f}" for r in results[model]]
        rows.append(row(f"**KL divergence**, nats/token, {model}", cells))
    rows += [row(f"**top-1 agreement**, {model}", [f"{r['top1']:.1%}" for r in results[model]]) for model in others]
    return "\n".join(rows)


def extrapolation_table(report: dict) -> str:
    """Perplexity by length of every variant, mean ± standard deviation over seeds."""
    rows = [
        row("position", [f"{a}–{b} N" for a, b in pairwise([0, *report["lengths"]])]),
        "|---" * (len(report["lengths"]) + 1) + "|",
    ]
    for variant, values in report["nll"].items():
        perplexity = np.exp(np.array(values))
        spread = perplexity.std(axis=0, ddof=1)
        rows.append(row(variant, [f"{m:.2f} ± {s:.2f}" for m, s in zip(perplexity.mean(axis=0), spread, strict=True)]))
    return "\n".join(rows)


def row(name: str, cells: list[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join([name, *cells]) + " |"


def fill(text: str, marker: str, content: str) -> str:
    """Replace what stands between the two comments named `marker`."""
    pattern = rf"(<!-- {marker} -->\n).*?(\n<!-- /{marker} -->)"
    filled, count = re.subn(pattern, lambda match: match[1] + content + match[2], text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"README.md has no pair of markers {marker!r}")
    return filled


def main(comparison_file: str, extrapolation_file: str) -> None:
    comparison = json.loads(Path(comparison_file).read_text(encoding="utf-8"))
    extrapolation = json.loads(Path(extrapolation_file).read_text(encoding="utf-8"))
    text = fill(README.read_text(encoding="utf-8"), "quality", quality_table(comparison))
    README.write_text(fill(text, "extrapolation", extrapolation_table(extrapolation)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:3])
