"""How fast packages are in the page, in Node.js and Chromium, beside onnxruntime-node: one thread, the same packages.

    python -m benchmarks.web package/float32 package/int8-dynamic --json web.json
    python -m benchmarks.web --json web.json --write    # the table of docs/web.md
    python -m benchmarks.web package/float32 package/int8-dynamic --json threads.json --threads 2

Every pass runs every package in every client, one after the other, float32 among them. Those of earlier runs with the
same `--json` count too, so that they can be spread over quiet moments. A prompt of 200 tokens, 128 new ones; of a few
rounds the last six count, and the first apart: there the browser's compiler is still at work. With `--threads` the page
alone is timed, with one and with so many threads in turn.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from docs.tables import fill
from expe_edge.runtime import Generator
from expe_edge.speed.machine import processor
from expe_edge.web.listing import package_info
from expe_edge.web.site import write_site
from tests import node
from tests.web.conftest import serving

PAGE = Path(__file__).parents[1] / "docs" / "web.md"
PROMPT, NEW_TOKENS, ROUNDS, COUNTED = 200, 128, 16, 6
#: Clients in the order in which they run.
CLIENTS = ("onnxruntime-node", "node", "chromium")

#: Milliseconds to the first token and from there to the last, of every round.
Times = list[list[float]]


def prompt_of(package: Path) -> tuple[str, list[int]]:
    """Return a text of `PROMPT` tokens, and them."""
    generator = Generator.load(package)
    ids = generator.encode("def read_file(path):\n    with open(path) as file:\n        return file.read()\n\n" * 40)
    text = generator.tokenizer.decode(ids[1:PROMPT].tolist())
    return text, generator.encode(text).tolist()


def one_pass(packages: Sequence[Path], site: Path) -> dict[str, dict[str, Times]]:
    """Return the times of every package in every client."""
    times: dict[str, dict[str, Times]] = {}
    for package in packages:
        _, ids = prompt_of(package)
        order = {"directory": str(package), "prompts": [ids], "maxNewTokens": NEW_TOKENS, "rounds": ROUNDS}
        # A text may end earlier; what is timed should not depend on it.
        info = {**package_info(package), "endOfText": None}
        native = node.run_script("speed.mjs", {**order, "threads": 1})
        ours = node.run_page({**order, "threads": 1, "info": info})
        shown = page_times(package, site, 1)
        times[package.name] = dict(zip(CLIENTS, (native["times"], ours["times"], shown), strict=True))
    return times


def page_times(package: Path, site: Path, threads: int) -> Times:
    """Return the times of a package in the page, which is cross-origin isolated."""
    text, _ = prompt_of(package)
    order = {"scenario": "speed", "browser": node.browser(), "threads": threads, "rounds": ROUNDS}
    with serving(site) as url:
        settings = {**order, "url": url, "packages": [package.name], "prompt": text, "maxNewTokens": NEW_TOKENS}
        times: Times = node.run_script("browser.mjs", settings)["times"][package.name]
    return times


def threads_pass(packages: Sequence[Path], site: Path, threads: int) -> dict[str, dict[str, Times]]:
    """Return the times of every package in the page, by the number of threads."""
    return {
        package.name: {str(count): page_times(package, site, count) for count in (1, threads)} for package in packages
    }


def endless_site(packages: Sequence[Path], place: Path) -> Path:
    """Write the page with these packages, whose texts end at no token."""
    write_site(packages, [package.name for package in packages], place, title="speed")
    listed = place / "packages" / "list.json"
    content = json.loads(listed.read_text())
    for info in content["packages"]:
        info["endOfText"] = None
    listed.write_text(json.dumps(content))
    return place


def table(report: dict[str, Any]) -> str:
    """A row for each package: medians over passes, with the ratios' lowest and highest."""
    rows = [
        "| package | MB | tokens/s in Chromium | in Node.js | onnxruntime-node | Chromium to onnxruntime-node "
        "| to float32 | first token, ms | the very first |",
        "|---" * 9 + "|",
    ]
    for name, size in sorted(report["sizes"].items(), key=lambda item: -item[1]):
        passes = [one for one in report["passes"] if name in one]
        float32 = np.array([speed(one["float32"]["chromium"]) for one in passes])
        speeds = {client: np.array([speed(one[name][client]) for one in passes]) for client in CLIENTS}
        ratio = speeds["chromium"] / speeds["onnxruntime-node"]
        first = np.median([[round_[0] for round_ in one[name]["chromium"]] for one in passes], axis=0)
        cells = [
            name,
            f"{size / 1e6:.1f}",
            *(f"{np.median(speeds[client]):,.0f}" for client in reversed(CLIENTS)),
            f"{np.median(ratio):.2f} ({ratio.min():.2f}–{ratio.max():.2f})",
            f"{np.median(speeds['chromium'] / float32):.2f}",
            f"{np.median(first[-COUNTED:]):.0f}",
            f"{first[0]:.0f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def threads_table(report: dict[str, Any]) -> str:
    """A row for each package: medians over passes of the page with one and with more threads."""
    passes = report["passes"]
    most = max(int(count) for count in next(iter(passes[0].values())))
    titles = ["package", "MB", "tokens/s, 1 thread", f"{most} threads", "ratio"]
    titles += ["first token, ms, 1 thread", f"{most} threads", "ratio"]
    rows = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name, size in report["sizes"].items():
        timed = [one[name] for one in passes if name in one]
        cells = [name, f"{size / 1e6:.1f}"]
        for measure in (speed, first):
            one, more = (np.array([measure(times[count]) for times in timed]) for count in ("1", str(most)))
            ratio = more / one
            cells += [f"{np.median(one):,.0f}", f"{np.median(more):,.0f}"]
            cells.append(f"{np.median(ratio):.2f} ({ratio.min():.2f}–{ratio.max():.2f})")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def first(times: Times) -> float:
    """Milliseconds to the first token, the median of the rounds that count."""
    return float(np.median([first for first, _ in times[-COUNTED:]]))


def speed(times: Times) -> float:
    """Tokens a second, the median of the rounds that count."""
    return float(np.median([1000 * (NEW_TOKENS - 1) / decode for _, decode in times[-COUNTED:]]))


def size_of(package: Path) -> int:
    """Bytes that a browser loads."""
    return sum((package / name).stat().st_size for name in ("model.onnx", "tokenizer.json"))


@click.command()
@click.argument("packages", nargs=-1, type=click.Path(path_type=Path))
@click.option("--passes", default=1, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True, help="What is added to, and read.")
@click.option("--threads", type=click.IntRange(2), help="Time the page with one and with so many threads instead.")
@click.option("--write", is_flag=True, help="Put the table into docs/web.md.")
def main(packages: tuple[Path, ...], passes: int, json_file: Path, threads: int | None, write: bool) -> None:
    """Time PACKAGES, which share a tokenizer and, without --threads, hold one in float32."""
    report = json.loads(json_file.read_text()) if json_file.exists() else {"passes": [], "sizes": {}}
    if packages:
        report["sizes"] |= {package.name: size_of(package) for package in packages}
        report["processor"] = processor()
        with tempfile.TemporaryDirectory() as directory:
            site = endless_site(packages, Path(directory, "site"))
            for _ in range(passes):
                timed = threads_pass(packages, site, threads) if threads else one_pass(packages, site)
                report["passes"].append(timed)
                json_file.write_text(json.dumps(report) + "\n")
    text = threads_table(report) if threads else table(report)
    print(text)
    if write:
        fill(PAGE, "threads" if threads else "speed", text)


if __name__ == "__main__":
    main()
