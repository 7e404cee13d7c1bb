"""What a place chooses: options that there are, and recipes that can be made."""

from __future__ import annotations

import dataclasses

import pytest

from expe_edge.errors import ExportError
from expe_edge.quant.recipe import Recipe
from expe_edge.quant.targets import TARGETS, chosen_for


@pytest.mark.parametrize("target", TARGETS)
def test_choices_are_options_of_a_recipe(target: str) -> None:
    values = {name: choice.value for name, choice in chosen_for(target, ()).items()}
    assert set(values) <= {field.name for field in dataclasses.fields(Recipe)}
    recipe = Recipe(**values, target=target, chosen=tuple(values))
    assert {name: recipe.to_dict()[name] for name in values} == values


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_given_is_not_chosen(target: str) -> None:
    for name in TARGETS[target]:
        assert name not in chosen_for(target, (name,))


def test_what_belongs_to_a_precision_is_left_with_it() -> None:
    assert set(chosen_for("android", ("precision",))) == {"ort_format"}
    assert set(chosen_for("web", ("precision",))) == {"cache"}


def test_no_such_place() -> None:
    with pytest.raises(ExportError) as caught:
        chosen_for("andriod", ())
    assert str(caught.value) == (
        "unknown target 'andriod'; did you mean 'android'? available: android, cuda, ios, server, web; change `target`"
    )
