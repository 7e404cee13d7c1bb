"""Every kind of package there is, made of one checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from expe_edge.export.exporter import export
from expe_edge.quant.recipe import PRECISIONS, Recipe


def kinds(training_length: int) -> list[Recipe]:
    """Return recipes of all precisions: as they are, portable, and with an int8 cache, heads' windows or both."""
    window: dict[str, Any] = {"head_window": training_length, "head_window_cost": 1.0}  # whatever it costs
    forms: list[dict[str, Any]] = [{}, {"portable": True}, {"cache": "int8"}, window, {"cache": "int8", **window}]
    precisions = [precision for precision in PRECISIONS if precision != "auto"]  # which is a mixture of the others
    return [Recipe(precision, **form) for form in forms for precision in precisions]


def make_kinds(checkpoint: Path, recipes: list[Recipe], out: Path, progress: Callable[[str], None]) -> None:
    """Export those that are not in `out` yet."""
    absent = [recipe for recipe in recipes if not (out / recipe.name).exists()]
    if absent:
        export(checkpoint, out, absent, progress=progress)
