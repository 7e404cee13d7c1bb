"""Generators over the packages, and kernels that are built here."""

from __future__ import annotations

from pathlib import Path

import pytest

from expe_edge.export.exporter import export
from expe_edge.quant.recipe import Recipe
from expe_edge.runtime import Generator
from expe_edge.runtime.kernels import Kernels
from tests.conftest import PRECISIONS

#: Packages of both kinds of cache, with float32 weights, whose sums are the same in any company.
CACHES = {"float32": Recipe(), "portable": Recipe(portable=True)}


@pytest.fixture(scope="module", params=PRECISIONS)
def any_generator(request: pytest.FixtureRequest, packages: Path) -> Generator:
    """A generator of each precision."""
    return Generator.load(packages / request.param)


@pytest.fixture(scope="module")
def generator(packages: Path) -> Generator:
    """The float32 generator, whose sums are the same whatever the batch and the chunks."""
    return Generator.load(packages / "float32")


def generator_of(checkpoint: Path, out: Path, recipe: Recipe) -> Generator:
    """A generator over a new package, which never ends before it is told to."""
    (exported,) = export(checkpoint, out, [recipe])
    generator = Generator.load(exported.path)
    generator.end_of_text = None
    return generator


@pytest.fixture(scope="session", params=CACHES)
def cached_generator(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Generator:
    """A generator over each kind of cache."""
    return generator_of(checkpoint, tmp_path_factory.mktemp("caches"), CACHES[request.param])


@pytest.fixture(scope="session")
def int8_cache_generator(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator:
    """A generator over an int8 cache: what the order of sums changes may tip a key over to the next level."""
    return generator_of(checkpoint, tmp_path_factory.mktemp("caches"), Recipe("float32", cache="int8"))


@pytest.fixture(scope="module")
def text(generator: Generator, text_folder: Path) -> list[int]:
    """A long text's ids."""
    ids: list[int] = generator.encode((text_folder / "09.txt").read_text(encoding="utf-8")).tolist()
    return ids[:600]


@pytest.fixture(scope="session")
def kernels(compiled: None, tmp_path_factory: pytest.TempPathFactory) -> Kernels:  # noqa: ARG001  # which may skip
    """What is compiled from the sources; skips where that cannot be."""
    built = Kernels(tmp_path_factory.mktemp("kernels"))
    built.build()
    return built


@pytest.fixture(scope="session")
def library(kernels: Kernels) -> Path:
    (path,) = kernels.directory.iterdir()
    return path
