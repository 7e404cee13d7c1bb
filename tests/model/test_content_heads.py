"""Heads that see content alone, the temperature of their scores, and slopes that a softplus keeps above 0."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from expe_edge.errors import ConfigError
from expe_edge.model.config import ExPEConfig
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.model.encoding import Projected
from expe_edge.positions.expe import ExPEParameters, ExQPEParameters, alibi_slopes
from expe_edge.training.record import explicit
from expe_edge.training.settings import make_settings, upgraded
from tests.strategies import expe_of, random_model, random_tokens, small_config

HEADS, N = 4, 16
#: What a new run of so many heads has.
RECIPE = {"softplus": True, "content_heads": 1, "temperature": 1 / math.log(N)}


def config_of(**parameters: Any) -> ExPEConfig:
    return small_config(training_length=N, positional_parameters={**RECIPE, **parameters})


def shaken(config: ExPEConfig) -> ExPEForCausalLM:
    """A model whose slopes are far from where they begin."""
    model = random_model(config)
    model.blocks[0].attention.qkv.weight += torch.randn(model.blocks[0].attention.qkv.weight.shape)
    return model


def projected(model: ExPEForCausalLM, tokens: int = 40) -> Projected:
    """Queries, keys, values and slopes of the first layer for random states."""
    torch.manual_seed(1)
    hidden, positions = torch.randn(1, tokens, model.config.hidden_size), torch.arange(tokens)[None]
    return expe_of(model).project(model.blocks[0].attention.qkv.weight, hidden, positions)


def test_slopes_are_not_below_0_and_those_of_content_heads_are_0() -> None:
    slopes = projected(shaken(config_of(content_heads=2))).slopes
    assert slopes is not None
    assert (slopes[:, :2] >= 0).all()
    assert (slopes[:, 2:] == 0).all()


def test_without_a_softplus_some_slopes_are_below_0() -> None:
    """That the case above is one in which the softplus has something to do."""
    slopes = projected(shaken(config_of(softplus=False))).slopes
    assert slopes is not None
    assert (slopes[:, :3] < 0).any()
    assert (slopes[:, 3:] == 0).all()


@pytest.mark.parametrize("shared", [1, 2, 4])
def test_heads_with_slopes_begin_as_alibis_ladder_of_their_own(shared: int) -> None:
    """Of a query without content: (1 + 1/220) times the slope, which is what a softplus four times as steep adds."""
    torch.manual_seed(0)
    config = config_of()
    config.num_key_value_heads = shared
    positional = expe_of(ExPEForCausalLM(config))
    weight = ExPEForCausalLM(config).blocks[0].attention.qkv.weight
    hidden = torch.zeros(1, 3, config.hidden_size)
    slopes = positional.project(weight, hidden, torch.arange(3)[None]).slopes
    assert slopes is not None
    found = slopes[0, :3, 0, 0].detach().numpy() / math.sqrt(config.head_dim)
    np.testing.assert_allclose(found, np.array(alibi_slopes(3)) * math.log1p(math.exp(4)) / 4, rtol=1e-5)


def test_temperature_multiplies_the_content_heads_queries_by_the_logarithm_of_what_they_see() -> None:
    positional = expe_of(random_model(config_of()))
    query, seen = torch.randn(2, HEADS, 5, 8), torch.tensor([[1, 2, 4, N, N**2], [1, 1, 1, 1, 1]])
    tempered = positional.temper(query, seen)
    assert torch.equal(tempered[:, :3], query[:, :3])
    expected = torch.log(seen.double()) / math.log(N)  # 0 for one key, 1 for N, 2 for N²
    torch.testing.assert_close(tempered[:, 3].double(), query[:, 3].double() * expected[..., None])


@pytest.mark.parametrize("offset", [1, 2**20, 2**24 - 40])
def test_predictions_are_bit_for_bit_the_same_at_every_absolute_position(offset: int) -> None:
    config = config_of()
    model, tokens = random_model(config), torch.from_numpy(random_tokens(config, 40))
    here, there = (
        model(input_ids=tokens, position_ids=torch.arange(begin, begin + 40)[None], use_cache=False).logits
        for begin in (0, offset)
    )
    assert torch.equal(here, there)


def test_a_gate_of_zero_weights_halves_what_every_head_has_read() -> None:
    gated, plain = random_model(small_config(output_gate=True)), random_model(small_config())
    plain.load_state_dict({name: w for name, w in gated.state_dict().items() if "gate" not in name})
    for with_gate, without in zip(gated.blocks, plain.blocks, strict=True):
        assert with_gate.attention.gate is not None
        with_gate.attention.gate.weight.zero_()
        without.attention.out.weight /= 2
    tokens = torch.from_numpy(random_tokens(gated.config, 20))
    torch.testing.assert_close(gated(tokens).logits, plain(tokens).logits)


# What a new run has.


@pytest.mark.parametrize(
    ("given", "heads", "found"),
    [
        ({}, 4, {"softplus": True, "content_heads": 1}),
        ({}, 6, {"softplus": True, "content_heads": 2}),
        ({}, 2, {"softplus": True, "content_heads": 0, "temperature": 0.0}),
        ({"content_heads": 0}, 6, {"softplus": True, "content_heads": 0, "temperature": 0.0}),
        ({"slopes": "zero"}, 6, {"softplus": False, "content_heads": 2}),
        ({"slopes": (0.5, 0.25)}, 6, {"softplus": False, "content_heads": 0, "temperature": 0.0}),
    ],
)
def test_the_recipe_of_a_new_run(given: dict[str, Any], heads: int, found: dict[str, Any]) -> None:
    assert ExPEParameters.recipe(given, 512, heads) == {"temperature": 1 / math.log(512), **found}


def test_the_papers_form_has_none_of_it_and_exqpe_no_softplus() -> None:
    assert ExPEParameters.recipe({"where": "query_key"}, 512, 6) == {}
    assert ExQPEParameters.recipe({}, 512, 6) == {
        "softplus": False, "content_heads": 2, "temperature": 1 / math.log(512),
    }  # fmt: skip


def test_settings_of_a_run_spell_it_out_and_what_was_recorded_before_stays_without() -> None:
    settings = explicit(make_settings("small"))
    assert settings.output_gate
    assert settings.positional_parameters["content_heads"] == 2
    before = upgraded({"positional": "expe", "positional_parameters": {"where": "key", "slopes": "alibi"}})
    again = explicit(make_settings("small", stored=before))
    assert not again.output_gate
    assert again.positional_parameters["slopes"] == "alibi"
    assert not {"softplus", "content_heads", "temperature"} & set(again.positional_parameters)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"content_heads": HEADS}, "content_heads is 4; allowed: 0 to 3"),
        ({"content_heads": -1, "temperature": 0.0}, "content_heads is -1; allowed: 0 to 3"),
        ({"content_heads": 0}, "temperature is .*, but there are no content_heads"),
        ({"temperature": -0.1}, "temperature is -0.1; allowed: 0 to 16"),
        ({"temperature": math.nan}, "temperature is nan; it must be a number"),
        ({"where": "query_key"}, "softplus is True, which needs where: key, not query_key"),
        ({"slopes": "random"}, "softplus needs slopes that begin above 0"),
        ({"slopes": (0.5, 0.25, 0.0, 0.0)}, "slopes is .*; softplus needs them above 0"),
        ({"slopes": (0.5, 0.25, 0.1, 0.1)}, "slopes is .*; give 0 for the last 1, content_heads"),
    ],
)
def test_what_cannot_be(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**parameters)
