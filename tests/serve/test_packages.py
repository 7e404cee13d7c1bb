"""Every kind of package is served: answers are its generator's own, whether rows decode together or one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from expe_edge.export.exporter import export
from expe_edge.package.reference import REFERENCE_PRECISIONS, reference_package
from expe_edge.quant.recipe import Recipe
from expe_edge.runtime import Generator
from tests.conftest import PRECISIONS, needs_int8_cache, needs_windows
from tests.manifests import edit_manifest, read_manifest
from tests.serve.conftest import SETTINGS, Running, running

PROMPTS = ["the tree", "a river runs under the old bright stone and the tree grows over", "but"]
#: Beside one package for each precision: of other operators, other caches, and heads that keep a window.
SPECIAL = [
    Recipe(portable=True),
    Recipe("int8-dynamic", portable=True),
    Recipe("int8-static", portable=True),
    *(pytest.param(Recipe(name, cache="int8"), marks=needs_int8_cache) for name in ("float32", "int8-static")),
    *(
        pytest.param(Recipe(name, head_window=16, head_window_cost=1000.0), marks=needs_windows)
        for name in ("float32", "int8-dynamic")
    ),
    pytest.param(
        Recipe("int8-static", cache="int8", head_window=16, head_window_cost=1000.0),
        marks=[needs_windows, needs_int8_cache],
    ),
]


def name_of(recipe: object) -> str:
    return recipe.name if isinstance(recipe, Recipe) else str(recipe)


def require_own_answers(one: Running, copies: int = 4) -> None:
    """Ask for so many of every prompt at once, twice, and compare with the generator's own."""
    prompts = [f"{prompt} {index}" for index in range(copies) for prompt in PROMPTS]
    expected = one.expected(prompts, max_new_tokens=30, sampling={"seed": 0})
    for _ in range(2):  # the second time behind what was kept of the first
        answer = one.client().completions.create(model=one.server.service.model, prompt=prompts, max_tokens=30, seed=0)
        assert [choice.text for choice in answer.choices] == [each.text for each in expected]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_packages_of_every_precision(packages: Path, precision: str) -> None:
    """Rows that share something when they run together run one by one; that is found out, and not told."""
    generator = Generator.load(packages / precision, threads=1)
    generator.end_of_text = None
    with running(generator, SETTINGS) as one:
        assert one.server.service.together == (precision not in ("int8-dynamic", "int8-weight"))
        require_own_answers(one)


@pytest.mark.parametrize("recipe", SPECIAL, ids=name_of)
def test_packages_of_every_other_kind(checkpoint: Path, tmp_path: Path, recipe: Recipe) -> None:
    (exported,) = export(checkpoint, tmp_path, [recipe])
    generator = Generator.load(exported.path, threads=1)
    generator.end_of_text = None
    with running(generator, SETTINGS) as one:
        require_own_answers(one)


@pytest.mark.parametrize("precision", REFERENCE_PRECISIONS)
def test_the_reference_model(precision: str) -> None:
    with running(Generator.load(reference_package(precision), threads=1), SETTINGS) as one:
        require_own_answers(one, copies=1)


@pytest.mark.parametrize("reach", [2, 9, 64])
def test_a_package_of_few_positions(own_package: Path, reach: int) -> None:
    """Whether rows may run together is tried within them."""
    edit_manifest(own_package, model={**read_manifest(own_package)["model"], "max_position_embeddings": reach})
    generator = Generator.load(own_package, threads=1)
    with running(generator, replace(SETTINGS, context=reach)) as one:
        assert one.server.service.together
