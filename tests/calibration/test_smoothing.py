"""Smoothing: the float model stays the same, and what quantization rounds gets easier."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from expe_edge.calibration import smoothing
from expe_edge.calibration.evidence import Evidence
from expe_edge.calibration.observations import Calibration, observe, sample_windows, watch
from expe_edge.calibration.smoothing import STRENGTHS, MakeFormat, Smoothed, smooth
from expe_edge.divergence import divergence
from expe_edge.graph.build import build_graph, graph_contract
from expe_edge.graph.linears import Float32, FormatOptions, LinearFormat, StaticInt8
from expe_edge.graph.weights import ModelWeights
from expe_edge.quant.channels import Range
from expe_edge.quant.formats import Formats
from expe_edge.quant.recipe import Recipe
from tests.graphs import CONFIG, LINEARS, arrays_of, random_weights, run_text, token_stream
from tests.strategies import small_config

#: A start other than 0, so that positions add a constant to values too.
VALUES_FROM_A_HALF = {
    "positional_parameters": {"where": "query_key_value", "start": 0.5},
    "max_position_embeddings": 4096,
}
#: Name to what makes a model differ from `small_config`, and whether its positions are folded.
MODELS: dict[str, tuple[dict[str, Any], bool]] = {
    "grouped heads": ({}, True),
    "ungrouped heads": ({"num_key_value_heads": 4}, True),
    "inline": ({}, False),
    "gelu": ({"hidden_act": "gelu"}, True),
    "tied": ({"tie_word_embeddings": True}, True),
    "paper": ({"positional_parameters": {"where": "query_key"}}, True),
    "positions in values": (VALUES_FROM_A_HALF, True),
    "positions in values, inline": ({"positional_parameters": {"where": "query_key_value"}}, False),
    "positions in the embedding": ({"positional_parameters": {"where": "embedding"}}, False),
    "exqpe": ({"positional": "exqpe"}, True),
    "rotary": ({"positional": "rotary"}, True),
    "relative": ({"positional": "relative"}, True),
}
every_model = pytest.mark.parametrize("name", MODELS)


def static(linear: str, bounds: Range) -> LinearFormat[Any]:
    return StaticInt8(FormatOptions(ranges={linear: bounds}))


@functools.cache
def weights_of(name: str) -> ModelWeights:
    changes, folded = MODELS[name]
    return random_weights(small_config(**changes), folded=folded)


def smoothed(weights: ModelWeights, make: MakeFormat = static) -> Smoothed:
    windows = sample_windows(token_stream(300, weights.config), 32, Calibration(windows=4))
    return smooth(
        weights, observe(watch(build_graph(weights, Float32())), graph_contract(weights.config), windows), make
    )


def float_logits(weights: ModelWeights) -> np.ndarray:
    model = build_graph(weights, Float32()).model
    return run_text(model, graph_contract(weights.config), token_stream(100, weights.config), [80, 5, *[1] * 15])[0]


# The float model.


@every_model
@pytest.mark.parametrize("strength", [0.75, None], ids=["strong", "searched"])
def test_the_float_model_stays_the_same(name: str, strength: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if strength is not None:
        monkeypatch.setattr(smoothing, "STRENGTHS", (strength,))
    before, expected = weights_of(name), float_logits(weights_of(name))
    after, strengths = smoothed(before)
    assert np.abs(float_logits(after) - expected).max() <= 1e-4 * np.abs(expected).max()
    assert set(strengths.values()) <= {*STRENGTHS}
    if strength is not None:
        old, new = (build_graph(weights, Float32()).linears for weights in (before, after))
        assert not any(np.array_equal(old[linear].weight, new[linear].weight) for linear in strengths)


@every_model
def test_every_linear_that_can_be_is_searched(name: str) -> None:
    """Not what is behind gelu, nor what stands behind positions, nor a head that is also the embedding."""
    (changes, folded), config = MODELS[name], weights_of(name).config
    layers = ["attention.out", "feed_forward.up"]
    if changes.get("hidden_act") != "gelu":
        layers.append("feed_forward.down")
    if folded or changes.get("positional_parameters") == {"where": "embedding"}:
        layers.append("attention.qkv")
    expected = {f"layers.{layer}.{part}" for layer in range(2) for part in layers}
    assert smoothed(weights_of(name)).strengths.keys() == expected | (set() if config.tie_word_embeddings else {"head"})


@every_model
def test_the_search_rounds_every_input_as_the_graph_does(name: str) -> None:
    weights, found = weights_of(name), {}

    class Watched(StaticInt8):
        def round_inputs(self, linear: str, hidden: np.ndarray, *, peaked: bool = False) -> np.ndarray:
            found[linear] = peaked
            return super().round_inputs(linear, hidden, peaked=peaked)

    smoothed(weights, lambda linear, bounds: Watched(FormatOptions(ranges={linear: bounds})))
    linears = build_graph(weights, Float32()).linears
    assert found == {linear: linears[linear].peaked for linear in found}


@every_model
def test_strength_zero_leaves_every_bit_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothing, "STRENGTHS", (0.0,))
    before = weights_of(name)
    after = smoothed(before).weights
    for old, new in zip(arrays_of(before), arrays_of(after), strict=True):
        np.testing.assert_array_equal(old, new)
    assert after.config is before.config


# What it is for: one channel of an input many times larger than the others, its weights as much smaller.

FACTOR = np.float32(60)


def scaled(array: np.ndarray, *index: Any, by: np.float32) -> np.ndarray:
    changed = array.copy()
    changed[index] *= by
    return changed


def in_attention_norm(weights: ModelWeights) -> ModelWeights:
    layer = weights.layers[0]
    assert layer.positions is not None
    positions = dataclasses.replace(
        layer.positions, slope_weight=scaled(layer.positions.slope_weight, 7, by=1 / FACTOR)
    )
    return in_layer(
        weights,
        attention_norm=scaled(layer.attention_norm, 7, by=FACTOR),
        qkv=scaled(layer.qkv, 7, by=1 / FACTOR),
        positions=positions,
    )


def in_values(weights: ModelWeights) -> ModelWeights:
    """One channel of the values of key/value head 1, which queries' heads 2 and 3 read."""
    layer, size = weights.layers[0], weights.config.head_dim
    begin = layer.qkv.shape[1] - 2 * size
    rows = [2 * size + 3, 3 * size + 3]
    return in_layer(
        weights,
        qkv=scaled(layer.qkv, slice(None), begin + size + 3, by=FACTOR),
        out=scaled(layer.out, rows, by=1 / FACTOR),
    )


def in_feed_forward_norm(weights: ModelWeights) -> ModelWeights:
    layer = weights.layers[0]
    return in_layer(
        weights,
        feed_forward_norm=scaled(layer.feed_forward_norm, 7, by=FACTOR),
        up=scaled(layer.up, 7, by=1 / FACTOR),
    )


def in_the_gated_half(weights: ModelWeights) -> ModelWeights:
    layer = weights.layers[0]
    width = len(layer.down)
    return in_layer(
        weights,
        up=scaled(layer.up, slice(None), width + 7, by=FACTOR),
        down=scaled(layer.down, 7, by=1 / FACTOR),
    )


def in_the_last_norm(weights: ModelWeights) -> ModelWeights:
    return dataclasses.replace(
        weights, norm=scaled(weights.norm, 7, by=FACTOR), head=scaled(weights.head, 7, by=1 / FACTOR)
    )


def in_layer(weights: ModelWeights, **changes: Any) -> ModelWeights:
    first, *others = weights.layers
    return dataclasses.replace(weights, layers=(dataclasses.replace(first, **changes), *others))


PLANTED: dict[str, Callable[[ModelWeights], ModelWeights]] = {
    "layers.0.attention.qkv": in_attention_norm,
    "layers.0.attention.out": in_values,
    "layers.0.feed_forward.up": in_feed_forward_norm,
    "layers.0.feed_forward.down": in_the_gated_half,
    "head": in_the_last_norm,
}


@pytest.mark.parametrize("precision", ["int8-static", "int4-weight"])
@pytest.mark.parametrize("linear", PLANTED)
def test_an_outlier_is_moved_into_the_weights_as_if_it_had_never_been(linear: str, precision: str) -> None:
    calibration, recipe = Calibration(windows=6), Recipe(precision, solver="rtn", smoothing=True)
    windows, tokens = sample_windows(token_stream(400), 32, calibration), token_stream(100)
    expected = float_logits(random_weights())

    def lost(evidence: Evidence) -> float:
        model = evidence.build(recipe, Formats({linear: precision})).model
        return float(divergence(expected, run_text(model, graph_contract(CONFIG), tokens)[0]).mean())

    tame, planted = (
        Evidence(weights, calibration, lambda: windows)
        for weights in (random_weights(), PLANTED[linear](random_weights()))
    )
    np.testing.assert_allclose(float_logits(planted.weights), expected, atol=1e-3)
    names = dict.fromkeys(LINEARS, precision)
    smoothed, strengths = planted.smoothed(recipe, names)

    assert strengths[linear] > 0
    assert 0 < lost(smoothed) < lost(planted)
    assert lost(smoothed) < 2 * lost(tame.smoothed(recipe, names)[0])
