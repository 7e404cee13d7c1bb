"""Measures the reference model: its figures and samples, into docs/reference.md and docs/reference.json.

    python -m reference.card

Texts are those that the standard library of Python holds out, which shared little with anything that was trained on.
Takes most of an hour on two cores.
"""

from __future__ import annotations

import ast
import codeop
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from docs.tables import fill, row
from expe_edge.cli.reference import introduce_reference
from expe_edge.package.reference import REFERENCE_PRECISIONS, reference_package
from expe_edge.quality import Comparison, ProbeReport, ProbeSettings, compare_by_length, probe
from expe_edge.quality.comparison import long_documents
from expe_edge.quality.scoring import Ids, open_side_by_side
from expe_edge.runtime import Completion, Generator, Sampling
from expe_edge.study.machine import processor, versions

DOCS = Path(__file__).parents[1] / "docs"
PAGE, FIGURES = DOCS / "reference.md", DOCS / "reference.json"

PROMPTS = (
    "def read_json(path):",
    "import os\nimport sys\n\n\ndef main(",
    "class Node:\n    def __init__(self",
    "def fibonacci(n):",
    "def test_addition():",
    "@dataclass\nclass Point:",
    "async def fetch(session, url):",
    "with open(filename) as file:",
    "try:\n    import numpy as np\nexcept",
    'if __name__ == "__main__":',
)
#: Tokens that follow each.
CONTINUED = 128
SAMPLING = Sampling(temperature=0.7, min_p=0.05, seed=0)
#: Ends of the buckets and lengths of the probes' texts, in N; where the needle stands; cases for each.
LENGTHS, PROBED = (1, 2, 4, 8, 16), ProbeSettings((1, 2, 4), 2, ("passkey", "keys"), (0.0, 0.5, 1.0), cases=2)
#: Tokens of the prompts that are timed, how often each is, and tokens decoded behind it.
TIMED = {1024: 5, 8192: 1}
DECODED = 65


def reads_as_python(prompt: str, completion: Completion) -> bool:
    """Tell whether the parser takes a prompt and what follows it.

    Where the limit of tokens ended the text, its last line is left out, and what is left may be the beginning of
    something: a block or a bracket that is still open is no fault. One whole statement must be the model's.
    """
    text = prompt + completion.text
    if completion.finish_reason != "length":
        return len(text) > len(prompt) and _parses(text)
    lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
    try:
        codeop.compile_command("".join(lines), symbol="exec")  # refuses what no further line can mend
    except (SyntaxError, ValueError):
        return False
    return any(_parses("".join(lines[:end])) for end in range(len(prompt.splitlines()) + 1, len(lines) + 1))


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def samples(generator: Generator) -> list[dict[str, Any]]:
    """Continue every prompt, greedily and by `SAMPLING`."""
    found = []
    for prompt in PROMPTS:
        greedy, sampled = (
            generator.generate([prompt], max_new_tokens=CONTINUED, sampling=sampling)[0]
            for sampling in (None, SAMPLING)
        )
        reads = reads_as_python(prompt, greedy)
        found.append({"prompt": prompt, "greedy": greedy.text, "reads_as_python": reads, "sampled": sampled.text})
    return found


def speed(generator: Generator, document: Ids) -> list[dict[str, float]]:
    """Measure the beginnings of a document: tokens read a second, and decoded behind them; the best of each."""
    found = []
    for tokens, times in TIMED.items():
        runs = [generator.generate([document[:tokens].tolist()], max_new_tokens=DECODED)[0] for _ in range(times)]
        decoded = (len(run.tokens) - 1 for run in runs)  # the first is chosen from the prompt's own logits
        found.append(
            {
                "prompt_tokens": tokens,
                "prefill": max(tokens / run.prefill_seconds for run in runs),
                "decode": max(count / run.decode_seconds for count, run in zip(decoded, runs, strict=True) if count),
            }
        )
    return found


def quality_table(comparison: Comparison) -> str:
    """Perplexity by token and bits by byte of every package, and the divergence of the others from the first."""
    n, first = comparison.training_length, comparison.models[0]
    rows = [row("position", [f"{r.bucket_start // n}–{r.bucket_end // n} N" for r in comparison.of(first)])]
    rows.append("|---" * (len(comparison.lengths) + 1) + "|")
    for model in comparison.models:
        results = comparison.of(model)
        perplexities = [f"{r.perplexity:.3f} ± {r.perplexity_stderr:.3f}" for r in results]
        rows.append(row(f"perplexity of a token, {model}", perplexities))
        bits = [f"{r.bits_per_byte:.4f} ± {r.bits_per_byte_stderr:.4f}" for r in results]
        rows.append(row(f"bits per byte, {model}", bits))
        if model != first:
            rows.append(row(f"KL from {first}, nats per token", [f"{r.kl:.4f} ± {r.kl_stderr:.4f}" for r in results]))
    return "\n".join(rows)


def probes_table(report: ProbeReport) -> str:
    """Exact matches and nats gained in every cell."""
    depths = sorted({cell.depth for cell in report.recall if cell.depth is not None})
    rows = [
        row("probe, tokens of text", [f"needle at {depth:.0%}" for depth in depths]),
        "|---" * (len(depths) + 1) + "|",
    ]
    for name in dict.fromkeys((cell.probe, cell.length) for cell in report.recall):
        cells = {cell.depth: cell for cell in report.recall if (cell.probe, cell.length) == name}
        rows.append(
            row(
                f"`{name[0]}`, {name[1]:,}",
                [
                    f"{round(cells[depth].exact_match * cells[depth].cases)} of {cells[depth].cases}, "
                    f"{cells[depth].gained:+.2f}"
                    for depth in depths
                ],
            )
        )
    return "\n".join(rows)


def speed_table(packages: dict[str, dict[str, Any]]) -> str:
    """Size and tokens a second of every package."""
    headings = [f"{what}, {tokens:,} tokens" for tokens in TIMED for what in ("prompt", "decoding behind")]
    rows = [row("package", ["size", *headings]), "|---" * (len(headings) + 2) + "|"]
    for name, each in packages.items():
        rates = [f"{timed[what]:,.0f}/s" for timed in each["speed"] for what in ("prefill", "decode")]
        rows.append(row(name, [f"{each['bytes'] / 1e6:.1f} MB", *rates]))
    return "\n".join(rows)


def samples_text(found: Sequence[dict[str, Any]]) -> str:
    """Every prompt with both continuations, and the count of those that are Python."""
    count = sum(sample["reads_as_python"] for sample in found)
    parts = [f"**{count} of {len(found)}** greedy continuations read as Python."]
    for number, sample in enumerate(found, 1):
        verdict = "reads as Python" if sample["reads_as_python"] else "does not read as Python"
        for how, title in (("greedy", f"{number}, greedy: {verdict}"), ("sampled", f"{number}, sampled")):
            parts += ["", f"{title}", "", "~~~~python", *(sample["prompt"] + sample[how]).splitlines(), "~~~~"]
    return "\n".join(parts)


@click.command()
@click.option("--documents", default=6, show_default=True, help="Most documents to score.")
def main(documents: int) -> None:
    """Measure all, print it, and write it to docs/reference.md and docs/reference.json."""
    scorers, at_once = open_side_by_side([reference_package(precision) for precision in REFERENCE_PRECISIONS])
    introduce_reference(scorers)
    comparison = compare_by_length(scorers, LENGTHS, documents, at_once=at_once)
    report = probe(scorers[:1], PROBED)
    (document, *_), _ = long_documents(scorers[0], (), "text", max(TIMED), 1)
    generators = {precision: Generator.load(reference_package(precision)) for precision in REFERENCE_PRECISIONS}
    packages = {
        name: {"bytes": generator.session.package.size, "speed": speed(generator, document)}
        for name, generator in generators.items()
    }
    found = samples(generators[REFERENCE_PRECISIONS[0]])
    figures = {
        "packages": packages,
        "quality": comparison.to_dict(),
        "probes": report.to_dict(),
        "samples": {"sampling": dataclasses.asdict(SAMPLING), "max_new_tokens": CONTINUED, "texts": found},
        "machine": {"processor": processor(), **versions()},
    }
    FIGURES.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    tables = {
        "quality": quality_table(comparison),
        "probes": probes_table(report),
        "speed": f"{speed_table(packages)}\n\n{processor()}, threads as by default.",
        "samples": samples_text(found),
    }
    for marker, content in tables.items():
        fill(PAGE, marker, content)
        click.echo(f"{content}\n")


if __name__ == "__main__":
    main()
