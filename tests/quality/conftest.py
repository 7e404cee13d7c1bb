"""Models to score, each opened once for a module."""

from __future__ import annotations

from pathlib import Path

import pytest

from expe_edge.quality.scoring import Scorer, open_scorer


@pytest.fixture(scope="module")
def scorers(checkpoint: Path, packages: Path) -> list[Scorer]:
    """The checkpoint first, then its packages."""
    return [open_scorer(path) for path in (checkpoint, packages / "float32", packages / "int8-dynamic")]
