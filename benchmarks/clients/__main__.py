"""Asks every client for the same with every kind of package, and writes the table of docs/clients.md.

    python -m benchmarks.clients demo/checkpoint

It makes what it needs: packages of the checkpoint, a Python with the oldest onnxruntime that is supported, and node's
packages. Both are kept. A client that cannot run here has a column that says why.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from benchmarks.clients.cases import Truth, choose_texts, tasks
from benchmarks.clients.clients import CLIENTS, Client, special_tasks
from benchmarks.clients.judging import Bench, Outcome
from benchmarks.clients.kinds import kinds, make_kinds
from benchmarks.clients.table import clients_table
from benchmarks.node.environment import MissingError
from docs.tables import fill
from expe_edge.model.config import ExPEConfig
from expe_edge.text.corpus import load_corpus

DOCS = Path(__file__).parents[2] / "docs"
PAGE, RECORDS = DOCS / "clients.md", DOCS / "clients.json"


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--only", "names", multiple=True, help="A client; repeatable. The page stays as it is then.")
@click.option("--new", default=48, show_default=True, help="Tokens that are generated at a time.")
@click.option("--packages", type=click.Path(path_type=Path), help="Where packages are kept; else they are made anew.")
def main(checkpoint: Path, names: tuple[str, ...], new: int, packages: Path | None) -> None:
    """Try all clients with every kind of package of CHECKPOINT; exit with 1 where an answer is wrong."""
    unknown = sorted(set(names) - {client.name for client in CLIENTS})
    if unknown:
        raise click.UsageError(f"no client {unknown[0]!r}; there are {', '.join(client.name for client in CLIENTS)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = packages or Path(temporary)
        length = ExPEConfig.from_pretrained(checkpoint).training_length
        recipes = kinds(length)
        make_kinds(checkpoint, recipes, folder, progress=lambda line: click.echo(line, err=True))
        truth = Truth(folder / recipes[0].name)
        corpus = load_corpus(**truth.generator.session.package.manifest.corpus)
        texts = choose_texts(truth, [document.text for document in corpus.held_out], new)
        asked = tasks(texts, length, new), special_tasks(texts, length, new)
        bench = Bench(folder, Path(temporary, "altered"), recipes, *asked)
        outcomes = []
        for client in CLIENTS:
            if not names or client.name in names:
                outcomes += _shown(client.name, list(bench.try_client(client)))
    headings = {client.name: heading(client) for client in CLIENTS}
    table = clients_table(outcomes, [task.name for task in bench.tasks], headings)
    click.echo(table)
    if not names:
        RECORDS.write_text(records_of(outcomes), encoding="utf-8")
        fill(PAGE, "clients", table)
    if any(outcome.result == "wrong" for outcome in outcomes):
        raise SystemExit(1)


def _shown(name: str, outcomes: list[Outcome]) -> list[Outcome]:
    """Say how many outcomes of a client there are of each result."""
    counts = Counter(outcome.result for outcome in outcomes)
    click.echo(f"{name}: " + ", ".join(f"{count} {result}" for result, count in counts.items()), err=True)
    return outcomes


def records_of(outcomes: Sequence[Outcome]) -> str:
    """Return outcomes as JSON, a line each, with notes by their number; figures are what their checks measured."""
    notes = list(dict.fromkeys(outcome.note for outcome in outcomes))
    lines = [json.dumps({**asdict(outcome), "note": notes.index(outcome.note)}) for outcome in outcomes]
    return f'{{"notes": {json.dumps(notes, indent=1)},\n"outcomes": [\n' + ",\n".join(lines) + "\n]}\n"


def heading(client: Client) -> str:
    """Return the heading of a client's column: its name, and its release where it can run here."""
    try:
        return f"{client.name} {client.start().version}"
    except MissingError:
        return client.name


if __name__ == "__main__":
    main()
