"""`expe-edge export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from expe_edge.cli.output import PATH
from expe_edge.cli.recipe import make_packages, recipe_options


@click.command(short_help="Turn a checkpoint into ONNX packages.")
@click.argument("checkpoint", type=PATH)
@recipe_options
def export(checkpoint: Path, **options: Any) -> None:
    """Export CHECKPOINT to self-contained ONNX packages, validated against PyTorch before they are written."""
    make_packages(checkpoint, **options)
