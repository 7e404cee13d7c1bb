"""Choosing tokens: ours against transformers' own processors, and against the probabilities asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from expe_edge.errors import GenerationError
from expe_edge.runtime.sampling import Sampler, Sampling, filter_scores, penalize, softmax
from expe_edge.training.checkpoint import load_checkpoint

VOCABULARY = 200
SEEN = np.array([0, 3, 3, 17, 150])
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 10},
    {"top_k": VOCABULARY - 1},
    {"top_k": VOCABULARY},
    {"top_k": VOCABULARY + 5},
    {"top_p": 0.05},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.01},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.7},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 1.3, "top_p": 0.6, "min_p": 0.2, "repetition_penalty": 1.9},
]


def ours(logits: np.ndarray, seen: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Scores (V,) after every filter, as `Sampler` applies them."""
    marks = np.zeros(len(logits), dtype=np.bool_)
    marks[seen] = True
    penalized = penalize(logits, marks, sampling.repetition_penalty)
    return filter_scores(penalized / sampling.temperature, sampling)


def theirs(logits: np.ndarray, seen: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The same by transformers."""
    steps: list[Any] = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.repetition_penalty != 1:
        steps.insert(0, RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.top_k > 0:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        steps.append(MinPLogitsWarper(sampling.min_p))
    ids, rows = torch.from_numpy(seen)[None], torch.from_numpy(logits)[None].clone()
    scores: torch.Tensor = LogitsProcessorList(steps)(ids, rows)
    return scores[0].numpy()


def random_logits(seed: int, size: int = VOCABULARY) -> np.ndarray:
    """Logits (V,) float32, peaked as a model's."""
    return (np.random.default_rng(seed).standard_normal(size) * 3).astype(np.float32)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_filters_are_those_of_transformers(settings: dict[str, Any], seed: int) -> None:
    sampling = Sampling(**{"temperature": 1.0, **settings})
    logits = random_logits(seed)

    found, expected = ours(logits, SEEN, sampling), theirs(logits, SEEN, sampling)

    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(softmax(found), torch.from_numpy(expected).double().softmax(-1), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("settings", [SETTINGS[-2], SETTINGS[-1]], ids=str)
def test_order_of_the_filters_is_that_of_generate(checkpoint: Path, settings: dict[str, Any]) -> None:
    """The scores that `generate` itself sampled from, step by step."""
    model = load_checkpoint(checkpoint).model
    prompt = torch.arange(1, 12)[None]
    torch.manual_seed(0)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=24,
        do_sample=True,
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
        **{"top_k": 0, **settings},
    )
    assert len(output.scores) > 4
    for step, (logits, expected) in enumerate(zip(output.logits, output.scores, strict=True)):
        seen = output.sequences[0, : prompt.shape[1] + step].numpy()
        found = ours(logits[0].numpy(), seen, Sampling(**settings))
        np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected[0].numpy()))
        np.testing.assert_allclose(found, expected[0].numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_equal_scores_at_the_edge_of_top_k_are_all_kept(top_k: int) -> None:
    logits = np.array([1, 5, 3, 5, 3, 3], dtype=np.float32)
    sampling = Sampling(temperature=1.0, top_k=top_k)

    np.testing.assert_array_equal(ours(logits, SEEN[:1], sampling), theirs(logits, SEEN[:1], sampling))


@given(
    seed=st.integers(0, 2**16),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.001, 1),
    min_p=st.floats(0, 1),
    temperature=st.floats(0.05, 10),
)
def test_likeliest_token_always_remains(seed: int, top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = random_logits(seed, 50)

    scores = ours(logits, SEEN[:1], sampling)

    assert scores.argmax() == logits.argmax()
    assert np.isfinite(scores.max())
    assert softmax(scores).sum() == pytest.approx(1)


# Drawing


@pytest.mark.parametrize("temperature", [1e-320, 1e-46, 1e-40, 1e-38, 1e-30])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1e300}])
def test_next_to_no_temperature_is_greedy(temperature: float, filters: dict[str, Any]) -> None:
    logits = np.random.default_rng(0).normal(0, 5, 50).astype(np.float32)
    prompt = np.array([7])
    with np.errstate(all="raise", under="ignore"):
        cold = Sampler(Sampling(temperature=temperature, seed=0, **filters), prompt, 50).choose(logits)
    greedy = Sampler(Sampling(repetition_penalty=filters.get("repetition_penalty", 1.0)), prompt, 50).choose(logits)
    assert cold == greedy


@pytest.mark.parametrize(("temperature", "penalty"), [(1e300, 1.0), (1.0, 1e300)])
def test_settings_without_measure_draw_some_token_without_a_warning(temperature: float, penalty: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, repetition_penalty=penalty, seed=0), np.array([7]), 50)
    with np.errstate(all="raise", under="ignore"):
        drawn = {sampler.choose(np.linspace(-9, 9, 50, dtype=np.float32)) for _ in range(20)}
    assert 7 not in drawn or penalty == 1


def test_without_temperature_the_likeliest_token_is_chosen() -> None:
    for seed in range(20):
        logits = random_logits(seed)
        assert Sampler(Sampling(), SEEN, VOCABULARY).choose(logits) == logits.argmax()


def test_penalty_moves_the_greedy_choice_off_a_token_once_it_is_seen() -> None:
    logits = np.array([0, 4, 3, -1], dtype=np.float32)
    sampler = Sampler(Sampling(repetition_penalty=2.0), np.array([0]), 4)

    assert [sampler.choose(logits) for _ in range(4)] == [1, 2, 1, 1]


def test_penalty_counts_the_prompt() -> None:
    logits = np.array([0, 4, 3, -1], dtype=np.float32)

    assert Sampler(Sampling(repetition_penalty=2.0), np.array([1]), 4).choose(logits) == 2


def test_logits_are_left_as_they_were() -> None:
    logits = random_logits(0)
    before = logits.copy()

    Sampler(Sampling(**SETTINGS[-1], seed=0), SEEN, VOCABULARY).choose(logits)

    np.testing.assert_array_equal(logits, before)


def draws(count: int, logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Tokens drawn one after another by one sampler."""
    sampler = Sampler(sampling, np.array([0]), len(logits))
    return np.array([sampler.choose(logits) for _ in range(count)])


def test_seed_makes_draws_repeatable() -> None:
    logits = random_logits(0) / 3

    first, again, other = (draws(200, logits, Sampling(temperature=1.0, seed=seed)) for seed in (7, 7, 8))

    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_no_seed_draws_anew() -> None:
    logits = random_logits(0) / 3

    first, other = (draws(200, logits, Sampling(temperature=1.0)) for _ in range(2))

    assert (first != other).any()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_their_probability_says(settings: dict[str, Any]) -> None:
    count, logits = 10_000, random_logits(3, 10) / 3
    sampling = Sampling(**settings, seed=0)
    expected = count * torch.from_numpy(theirs(logits, SEEN[:1], sampling)).double().softmax(-1).numpy()

    observed = np.bincount(draws(count, logits, sampling), minlength=len(logits))

    kept = expected > 0
    assert observed[~kept].sum() == 0
    chi_square = ((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)  # four standard deviations above its mean


# Settings


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("repetition_penalty", 0, "above 0"),
        ("repetition_penalty", -1.5, "above 0"),
        ("temperature", -0.1, "at least 0"),
        ("temperature", float("nan"), "at least 0"),
        ("top_k", -1, "at least 0"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("top_p", float("nan"), "above 0 and at most 1"),
        ("min_p", -0.1, "from 0 to 1"),
        ("min_p", 1.5, "from 0 to 1"),
        ("seed", -1, "at least 0"),
    ],
)
def test_setting_out_of_range_is_named(name: str, value: float, allowed: str) -> None:
    settings: dict[str, Any] = {name: value}
    with pytest.raises(GenerationError) as caught:
        Sampling(**settings)

    assert str(caught.value) == f"`{name}` is {value}; it must be {allowed}"
