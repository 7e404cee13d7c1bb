"""What commands do where no model is named: they take the reference model, and say so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from expe_edge.quality.scoring import Scorer


def say_reference(packages: Iterable[Path]) -> None:
    """Say on standard error which packages of the reference model are used."""
    names = " and ".join(package.name for package in packages)
    click.echo(f"no model is named: using the reference model, {names}", err=True)


def introduce_reference(scorers: Sequence[Scorer]) -> None:
    """Say which packages are used, and have them read, unless told otherwise, what the standard library holds out.

    Their own text is not installed. Nothing in it shares much with those documents (`reference/text.py`).
    """
    from expe_edge.text.corpus import STDLIB_WITH_TESTS

    say_reference(scorer.path for scorer in scorers)
    for scorer in scorers:
        scorer.corpus = {"sources": (STDLIB_WITH_TESTS,), "text_field": "text"}
