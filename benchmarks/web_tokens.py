"""Whether the page writes what our runtime writes, and where it does not, whether the two tokens were as likely.

    python -m benchmarks.web_tokens package/float32 package/int8-dynamic --write    # the table of docs/web.md

The page's model runs in Node.js, which is the WebAssembly of browsers. It completes every text, greedy. Then it reads
our tokens, one at a time, and logits of each are compared at the same place: by so much the two differ in one run of
that text. Where the texts part, the gap is that of our logits between our token and the page's. Where the portable form
of a package lies beside it, logits of these two on this CPU are compared too: the same sums in another order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from docs.tables import fill
from expe_edge.runtime import Generator
from expe_edge.web.listing import package_info
from tests import node

PAGE = Path(__file__).parents[1] / "docs" / "web.md"
NEW_TOKENS = 64
TEXTS = (
    "import os\n\n\ndef read_json(path):\n",
    'class Straße:\n    """日本語 🌳 <|endoftext|>"""\n\n    def __init__(self',
    "def main():\n    parser = argparse.ArgumentParser()\n" * 20,
    "import os\n" * 40,
    "    self.assertEqual(first, second)\n" * 40,
    "def read_file(path):\n    with open(path) as file:\n        return file.read()\n\n" * 40,
)


@dataclass(frozen=True)
class Found:
    """What one text showed. parted: the first token that differs, or None; gap: of its logits.

    difference: of all logits to the page's; beside: to the portable form's on this CPU, 0 where there is none.
    """

    parted: int | None
    gap: float
    difference: float
    beside: float


def one_text(generator: Generator, portable: Generator | None, package: Path, text: str) -> Found:
    """Complete a text with our runtime and the page, and compare."""
    prompt = generator.encode(text).tolist()
    ours = generator.generate([prompt], max_new_tokens=NEW_TOKENS)[0].tokens
    logits = logits_behind(generator, prompt, ours)
    chosen = logits[np.arange(len(ours)), ours]
    test = {"prompt": prompt, "tokens": ours, "logits": chosen.tolist(), "tolerance": 0}
    answer = page_answer(package, prompt, test)
    theirs = answer["completions"][0]["tokens"]
    parted = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    gap = 0.0 if parted is None else float(chosen[parted] - logits[parted, theirs[parted]])
    others = logits if portable is None else logits_behind(portable, prompt, ours)
    beside = np.abs(others[np.arange(len(ours)), ours] - chosen).max()
    return Found(parted, gap, answer["selfTest"]["difference"], float(beside))


def logits_behind(generator: Generator, prompt: list[int], tokens: list[int]) -> npt.NDArray[np.float32]:
    """Return the logits (len(tokens), V) that each token is chosen by, read one at a time as when generating."""
    session = generator.session
    cache = session.new_cache(1, len(prompt) + len(tokens))
    rows = [list(session.prefill(cache, np.array(prompt), last=True))[-1][-1].copy()]
    for token in tokens[:-1]:
        rows += [logits[-1].copy() for logits in session.prefill(cache, np.array([token]), last=True)]
    return np.stack(rows)


def page_answer(package: Path, prompt: list[int], test: dict[str, Any]) -> dict[str, Any]:
    """What the page's model writes, and how its logits differ from those of `test`."""
    info = {**package_info(package), "selfTest": test}
    order = {"directory": str(package), "info": info, "prompts": [prompt], "maxNewTokens": NEW_TOKENS}
    return node.run_page(order)


def row(package: Path) -> str:
    """A row of the table."""
    generator = Generator.load(package, threads=1, kernels="off")
    other = package.with_name(f"{package.name}-portable")
    portable = Generator.load(other, threads=1) if other.exists() else None
    found = [one_text(generator, portable, package, text) for text in TEXTS]
    parted = [
        f"text {number}, token {one.parted + 1}: gap {one.gap:.1g}, logits differ by {one.difference:.1g}"
        for number, one in enumerate(found, 1)
        if one.parted is not None
    ]
    equal = [one.difference for one in found if one.parted is None]
    cells = [
        package.name,
        f"{len(equal)} of {len(found)}",
        f"{max(equal):.1g}" if equal else "",
        "; ".join(parted),
        f"{max(one.beside for one in found):.1g}" if portable else "",
    ]
    return "| " + " | ".join(cells) + " |"


@click.command()
@click.argument("packages", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--write", is_flag=True, help="Put the table into docs/web.md.")
def main(packages: tuple[Path, ...], write: bool) -> None:
    """Compare the tokens of PACKAGES."""
    titles = [
        "package",
        "texts alike",
        "their logits differ by",
        "the others",
        "on a CPU, those of the portable form by",
    ]
    heading = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    table = "\n".join([*heading, *map(row, packages)])
    click.echo(table)
    if write:
        fill(PAGE, "tokens", table)


if __name__ == "__main__":
    main()
