"""Generators over the packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from expe_edge.runtime import Generator
from tests.conftest import PRECISIONS


@pytest.fixture(scope="module", params=PRECISIONS)
def any_generator(request: pytest.FixtureRequest, packages: Path) -> Generator:
    """A generator of each precision."""
    return Generator.load(packages / request.param)


@pytest.fixture(scope="module")
def generator(packages: Path) -> Generator:
    """The float32 generator, whose sums are the same whatever the batch and the chunks."""
    return Generator.load(packages / "float32")
