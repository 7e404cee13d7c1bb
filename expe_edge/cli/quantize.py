"""`expe-edge quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from expe_edge.cli.output import PATH
from expe_edge.cli.recipe import make_packages, recipe_options


@click.command(short_help="Make packages of other formats from a package.")
@click.argument("source", type=PATH, metavar="PACKAGE|CHECKPOINT")
@recipe_options
def quantize(source: Path, **options: Any) -> None:
    """Make packages of other formats from a float32 PACKAGE, or from a CHECKPOINT, without training again.

    A package is validated against its own float32 graph, a checkpoint against PyTorch.
    """
    make_packages(source, **options)
