"""Measures the reference model: figures and samples, into docs/reference.md and .json, and its packages' model cards.

    python -m reference.card

Texts are those that the standard library of Python holds out, which shared little with anything that was trained on.
On two cores it takes long, most of that `quality`; --part measures one part again.
"""

from __future__ import annotations

import ast
import codeop
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from docs.tables import fill, row
from expe_edge.cli.reference import introduce_reference
from expe_edge.cli.tables import with_error
from expe_edge.hub.card import CardOptions, LengthQuality, Quality, write_card
from expe_edge.package.directory import MODEL_FILE, read_package
from expe_edge.package.reference import REFERENCE_PRECISIONS, reference_package
from expe_edge.quality import ProbeSettings, Scorer, compare_by_length, probe
from expe_edge.quality.comparison import long_documents
from expe_edge.quality.scoring import open_side_by_side
from expe_edge.runtime import Completion, Generator, Sampling
from expe_edge.speed.machine import processor, versions

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
#: Ends of the buckets, in N, and most documents that they are measured on; the probes, as small as tells something.
LENGTHS, DOCUMENTS = (1, 2, 4, 8, 16), 4
PROBED = ProbeSettings((1, 2, 4), 2, ("passkey", "keys"), (0.0, 0.5, 1.0), cases=2)
#: What the packages' cards say of licence and language: the licence is this repository's.
OF_PACKAGES = CardOptions(license="apache-2.0", language="code")
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


def quality() -> dict[str, Any]:
    """Compare the packages by length."""
    scorers, at_once = _scorers(REFERENCE_PRECISIONS)
    return compare_by_length(scorers, LENGTHS, DOCUMENTS, at_once=at_once).to_dict()


def probes() -> dict[str, Any]:
    """Ask the first package for needles."""
    return probe(_scorers(REFERENCE_PRECISIONS[:1])[0], PROBED).to_dict()


def speed() -> dict[str, Any]:
    """Time the beginnings of a document: tokens read a second, and decoded behind them; the best of each."""
    (scorer,), _at_once = _scorers(REFERENCE_PRECISIONS[:1])
    (document,), _byte_lengths = long_documents(scorer, (), "text", max(TIMED), 1)
    packages = {}
    for precision in REFERENCE_PRECISIONS:
        generator = Generator.load(reference_package(precision))
        timed = [_timed(generator, document[:tokens].tolist(), times) for tokens, times in TIMED.items()]
        packages[precision] = {"bytes": generator.session.package.size, "timed": timed}
    return {"processor": processor(), "versions": versions(), "packages": packages}


def _timed(generator: Generator, prompt: list[int], times: int) -> dict[str, float]:
    runs = [generator.generate([prompt], max_new_tokens=DECODED)[0] for _ in range(times)]
    decoded = [(len(run.tokens) - 1) / run.decode_seconds for run in runs if run.decode_seconds]  # one is prefill's
    prefill = max(len(prompt) / run.prefill_seconds for run in runs)
    return {"prompt_tokens": len(prompt), "prefill": prefill, "decode": max(decoded, default=0.0)}


def samples() -> dict[str, Any]:
    """Continue every prompt with the first package, greedily and by `SAMPLING`."""
    generator, texts = Generator.load(reference_package(REFERENCE_PRECISIONS[0])), []
    for prompt in PROMPTS:
        greedy, sampled = (
            generator.generate([prompt], max_new_tokens=CONTINUED, sampling=sampling)[0]
            for sampling in (None, SAMPLING)
        )
        reads = reads_as_python(prompt, greedy)
        texts.append({"prompt": prompt, "greedy": greedy.text, "reads_as_python": reads, "sampled": sampled.text})
    return {"sampling": dataclasses.asdict(SAMPLING), "max_new_tokens": CONTINUED, "texts": texts}


def _scorers(precisions: Sequence[str]) -> tuple[list[Scorer], int]:
    scorers, at_once = open_side_by_side([reference_package(precision) for precision in precisions])
    introduce_reference(scorers)
    return scorers, at_once


def quality_table(found: dict[str, Any]) -> str:
    """Perplexity of tokens and bits per byte of every package, and the divergence of the others from the first."""
    n, (first, *_) = found["training_length"], found["models"]
    buckets = {model: [result for result in found["results"] if result["model"] == model] for model in found["models"]}
    rows = [
        row("position", [f"{r['bucket_start'] // n}–{r['bucket_end'] // n} N" for r in buckets[first]]),
        "|---" * (len(buckets[first]) + 1) + "|",
    ]
    for model, results in buckets.items():
        rows.append(row(f"perplexity of a token, {model}", [_cell(r, "perplexity", 3) for r in results]))
        rows.append(row(f"bits per byte, {model}", [_cell(r, "bits_per_byte", 4) for r in results]))
        if model != first:
            rows.append(row(f"KL from {first}, nats per token", [_cell(r, "kl", 4) for r in results]))
    count = buckets[first][0]["documents"]
    return "\n".join([*rows, "", f"{count} documents, ± standard error over them."])


def _cell(result: dict[str, Any], measure: str, digits: int) -> str:
    return with_error(result[measure], result[f"{measure}_stderr"], f".{digits}f")


def probes_table(found: dict[str, Any]) -> str:
    """Exact matches and nats gained in every cell."""
    depths = sorted({cell["depth"] for cell in found["recall"]})
    rows = [
        row("probe, tokens of text", [f"needle at {depth:.0%}" for depth in depths]),
        "|---" * (len(depths) + 1) + "|",
    ]
    for name, length in dict.fromkeys((cell["probe"], cell["length"]) for cell in found["recall"]):
        cells = [cell for cell in found["recall"] if (cell["probe"], cell["length"]) == (name, length)]
        cells.sort(key=lambda cell: float(cell["depth"]))
        right = [f"{round(cell['exact_match'] * cell['cases'])} of {cell['cases']}" for cell in cells]
        gained = [f"{cell['gained']:+.2f}" for cell in cells]
        rows.append(row(f"`{name}`, {length:,}", [", ".join(each) for each in zip(right, gained, strict=True)]))
    return "\n".join(rows)


def speed_table(found: dict[str, Any]) -> str:
    """Size and tokens a second of every package."""
    headings = [f"{what} {tokens:,} tokens" for tokens in TIMED for what in ("reading", "decoding behind")]
    rows = [row("package", ["size", *headings]), "|---" * (len(headings) + 2) + "|"]
    for name, package in found["packages"].items():
        rates = [f"{timed[what]:,.0f} tokens/s" for timed in package["timed"] for what in ("prefill", "decode")]
        rows.append(row(name, [f"{package['bytes'] / 1e6:.1f} MB", *rates]))
    return "\n".join([*rows, "", f"{found['processor']}, onnxruntime {found['versions']['onnxruntime']}."])


def samples_text(found: dict[str, Any]) -> str:
    """Every prompt with both continuations, and the count of those that are Python."""
    count = sum(sample["reads_as_python"] for sample in found["texts"])
    parts = [f"**{count} of {len(found['texts'])}** greedy continuations read as Python."]
    for number, sample in enumerate(found["texts"], 1):
        verdict = "reads as Python" if sample["reads_as_python"] else "does not read as Python"
        for how, title in (("greedy", f"{number}, greedy: {verdict}"), ("sampled", f"{number}, sampled")):
            lines = (sample["prompt"] + sample[how]).split("\n")
            parts += ["", title, "", "``````", *(line.rstrip() for line in lines), "``````"]
    return "\n".join(parts)


#: How each part is measured and shown.
PARTS: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    "quality": (quality, quality_table),
    "probes": (probes, probes_table),
    "speed": (speed, speed_table),
    "samples": (samples, samples_text),
}


def write_package_cards(figures: dict[str, Any]) -> None:
    """Write the model card of every package from the figures of `quality`."""
    found = figures["quality"]
    first, *_ = found["models"]
    for precision in REFERENCE_PRECISIONS:
        package = read_package(reference_package(precision))
        rows = [
            LengthQuality(
                row["bucket_start"], row["bucket_end"], row["perplexity"], None if precision == first else row["kl"]
            )
            for row in found["results"]
            if row["model"] == precision
        ]
        count = found["results"][0]["documents"]
        text = f"{count} documents of the standard library of Python, held out"
        quality_of = Quality(text, None if precision == first else first, rows)
        write_card(package.path, f"expe-edge-reference-{precision}", package.manifest, quality_of, OF_PACKAGES)


def graphs() -> dict[str, str]:
    """Tell the packages from others: the hash of each one's graph."""
    packages = [read_package(reference_package(precision)) for precision in REFERENCE_PRECISIONS]
    return {package.path.name: package.manifest.files[MODEL_FILE] for package in packages}


def shown(figures: dict[str, Any]) -> dict[str, str]:
    """Return what stands on the page for each part."""
    return {part: show(figures[part]) if part in figures else "Not measured yet." for part, (_, show) in PARTS.items()}


@click.command()
@click.option("--part", "parts", multiple=True, type=click.Choice(tuple(PARTS)), help="Repeatable.  [default: all]")
def main(parts: tuple[str, ...]) -> None:
    """Measure the card's parts, print them, and write them beside those that were measured of the same packages."""
    before = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.is_file() else {}
    figures = before if before.get("graphs") == graphs() else {"graphs": graphs()}
    for part in parts or PARTS:
        measure, show = PARTS[part]
        figures[part] = measure()
        FIGURES.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        click.echo(f"{show(figures[part])}\n")
    for part, text in shown(figures).items():
        fill(PAGE, part, text)
    if "quality" in figures:
        write_package_cards(figures)


if __name__ == "__main__":
    main()
