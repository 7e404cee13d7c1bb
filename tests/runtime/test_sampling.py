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
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from expe_edge.errors import GenerationError
from expe_edge.runtime.filters import left_in, top_indices
from expe_edge.runtime.penalties import Penalties
from expe_edge.runtime.sampling import Sampler, Sampling
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
    {"typical_p": 0.05},
    {"typical_p": 0.5},
    {"typical_p": 0.95},
    {"logit_bias": {3: 2.5, 17: -100.0, 199: 1.0}},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.8},
    {"temperature": 1.2, "top_k": 60, "typical_p": 0.7},
    {"temperature": 0.9, "top_p": 0.9, "typical_p": 0.6, "logit_bias": {0: 3.0, 17: 4.0}, "repetition_penalty": 1.3},
    {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 1.3, "top_p": 0.6, "min_p": 0.2, "repetition_penalty": 1.9},
]


#: What `left_in` takes all that is less likely to be.
NEVER = 1e-12


def ours(logits: np.ndarray, seen: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities (V,) float64 after everything, as `Sampler` applies it."""
    scores = Penalties(sampling, seen, len(logits)).apply(logits)
    ids, weights = left_in(scores, sampling)
    probabilities = np.zeros(len(logits))
    probabilities[slice(None) if ids is None else ids] = weights
    probabilities /= probabilities.sum()
    return probabilities


def theirs(logits: np.ndarray, seen: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The same by transformers."""
    steps: list[Any] = []
    if sampling.logit_bias:
        steps.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in sampling.logit_bias.items()}))
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    steps.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        steps.append(MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p < 1:
        steps.append(TypicalLogitsWarper(sampling.typical_p))
    ids, rows = torch.from_numpy(seen)[None], torch.from_numpy(logits)[None].clone()
    scores: torch.Tensor = LogitsProcessorList(steps)(ids, rows)
    probabilities: np.ndarray = scores[0].double().softmax(-1).numpy()
    return probabilities


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Compare probabilities (V,), and which tokens have any."""
    may_differ = (found < NEVER) & (expected < NEVER)
    np.testing.assert_array_equal((found > 0)[~may_differ], (expected > 0)[~may_differ])
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=NEVER)


def random_logits(seed: int, size: int = VOCABULARY) -> np.ndarray:
    """Logits (V,) float32, peaked as a model's."""
    return (np.random.default_rng(seed).standard_normal(size) * 3).astype(np.float32)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_filters_are_those_of_transformers(settings: dict[str, Any], seed: int) -> None:
    sampling = Sampling(**{"temperature": 1.0, **settings})
    logits = random_logits(seed)

    assert_same(ours(logits, SEEN, sampling), theirs(logits, SEEN, sampling))


@pytest.mark.parametrize("settings", [{"typical_p": 0.3}, {"typical_p": 0.9}, {"top_k": 40}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_filters_of_a_large_vocabulary(settings: dict[str, Any], spread: float) -> None:
    sampling = Sampling(**{"temperature": 1.0, **settings})
    logits = (np.random.default_rng(5).standard_normal(20_000) * spread).astype(np.float32)

    found, expected = ours(logits, SEEN, sampling), theirs(logits, SEEN, sampling)

    if spread > 0.5:  # among nearly equal tokens, which are the last ones is a matter of rounding
        differ = (found > NEVER) != (expected > NEVER)
        assert differ.sum() <= 2
        np.testing.assert_allclose(found[~differ], expected[~differ], rtol=1e-3, atol=1e-9)
    assert abs((found > 0).sum() - (expected > 0).sum()) <= 0.01 * (expected > 0).sum() + 1


@pytest.mark.parametrize("settings", [SETTINGS[-4], SETTINGS[-3], SETTINGS[-2], SETTINGS[-1]], ids=str)
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
        **{"top_k": 0, **{name: value for name, value in settings.items() if name != "logit_bias"}},
        sequence_bias={(token,): bias for token, bias in settings.get("logit_bias", {}).items()} or None,
    )
    assert len(output.scores) > 4
    for step, (logits, expected) in enumerate(zip(output.logits, output.scores, strict=True)):
        seen = output.sequences[0, : prompt.shape[1] + step].numpy()
        assert_same(ours(logits[0].numpy(), seen, Sampling(**settings)), expected[0].double().softmax(-1).numpy())


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_equal_scores_at_the_edge_of_top_k_are_all_kept(top_k: int) -> None:
    logits = np.array([1, 5, 3, 5, 3, 3], dtype=np.float32)
    sampling = Sampling(temperature=1.0, top_k=top_k)

    assert_same(ours(logits, SEEN[:1], sampling), theirs(logits, SEEN[:1], sampling))


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=400), st.data())
def test_top_indices_are_those_of_the_best_and_of_their_equals(values: list[int], data: st.DataObject) -> None:
    scores, count = np.array(values, dtype=np.float32), data.draw(st.integers(1, len(values)))

    expected = [index for index, value in enumerate(values) if value >= sorted(values)[-count]]

    assert top_indices(scores, count).tolist() == expected


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

    probabilities = ours(logits, SEEN[:1], sampling)

    assert probabilities.argmax() == logits.argmax()
    assert np.isfinite(probabilities).all()


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
        {"temperature": 1.0, "typical_p": 0.8},
        {"temperature": 1.0, "logit_bias": {2: 1.5, 4: -100.0}},
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_their_probability_says(settings: dict[str, Any]) -> None:
    count, logits = 10_000, random_logits(3, 10) / 3
    sampling = Sampling(**settings, seed=0)
    expected = count * theirs(logits, SEEN[:1], sampling)

    observed = np.bincount(draws(count, logits, sampling), minlength=len(logits))

    kept = expected > count * NEVER
    assert observed[~kept].sum() == 0
    chi_square = ((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)  # four standard deviations above its mean


def test_unlikely_tokens_of_many_are_drawn_as_often_as_they_should_be() -> None:
    """Those that a draw looks at only where it falls beyond the likely ones."""
    logits = np.full(20_000, -11.0, dtype=np.float32)  # together a third of the first
    logits[:2] = [1.0, 0.0]
    expected = np.exp(logits.astype(np.float64))
    expected /= expected.sum()

    observed = draws(4000, logits, Sampling(temperature=1.0, seed=0))

    rare = (observed >= 2).sum()
    share = expected[2:].sum()
    assert abs(rare - 4000 * share) < 4 * np.sqrt(4000 * share * (1 - share))
    assert len(set(observed[observed >= 2])) > 0.9 * rare


# Penalties


@pytest.mark.parametrize("frequency", [0.0, 0.4, -0.3])
@pytest.mark.parametrize("presence", [0.0, 1.1, -0.7])
def test_frequency_and_presence_are_those_of_openai(frequency: float, presence: float) -> None:
    """μ_j − c_j·frequency − [c_j > 0]·presence, c_j how often token j has been generated; the prompt does not count."""
    sampling = Sampling(frequency_penalty=frequency, presence_penalty=presence)
    penalties, generated = Penalties(sampling, np.array([1, 1, 2]), 6), [3, 4, 3, 3, 0]
    logits = np.array([0.5, -1.0, 2.0, 3.0, -0.25, 1.0], dtype=np.float32)

    for count in range(len(generated) + 1):
        so_far = generated[:count]
        expected = [
            value - so_far.count(token) * frequency - (token in so_far) * presence for token, value in enumerate(logits)
        ]
        np.testing.assert_allclose(penalties.apply(logits), expected, rtol=1e-6)
        if count < len(generated):
            penalties.note(generated[count])


def test_penalties_and_bias_apply_one_after_another() -> None:
    sampling = Sampling(logit_bias={1: 3.0}, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    penalties = Penalties(sampling, np.array([1]), 3)
    penalties.note(2)
    penalties.note(2)

    found = penalties.apply(np.array([1.0, -1.0, 4.0], dtype=np.float32))

    np.testing.assert_allclose(found, [1.0, (-1.0 + 3.0) / 2, 4.0 / 2 - 2 * 0.5 - 0.25])


def test_greedy_choice_goes_by_bias_and_penalties() -> None:
    logits = np.array([0, 4, 3, -1], dtype=np.float32)

    assert Sampler(Sampling(logit_bias={3: 100.0}), SEEN[:1], 4).choose(logits) == 3
    assert Sampler(Sampling(logit_bias={1: -100.0}), SEEN[:1], 4).choose(logits) == 2
    sampler = Sampler(Sampling(frequency_penalty=0.6), SEEN[:1], 4)
    assert [sampler.choose(logits) for _ in range(5)] == [1, 1, 2, 1, 2]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 0}, {"temperature": 2.0, "top_p": 0.9}], ids=str)
def test_allowed_tokens_alone_are_chosen(settings: dict[str, Any]) -> None:
    logits, allowed = random_logits(1), np.array([4, 90, 91, 150])
    sampler = Sampler(Sampling(**settings), SEEN, VOCABULARY)

    chosen = {sampler.choose(logits, allowed) for _ in range(50)}

    assert chosen <= set(allowed.tolist())
    assert settings or chosen == {int(allowed[logits[allowed].argmax()])}


@pytest.mark.parametrize("without", [1e300, -1e300, 10**400])
def test_penalties_and_bias_without_measure_stay_numbers(without: float) -> None:
    sampling = Sampling(
        frequency_penalty=without, presence_penalty=without, logit_bias={3: without}, repetition_penalty=1e300
    )
    sampler = Sampler(sampling, SEEN, VOCABULARY)
    with np.errstate(all="raise", under="ignore"):
        assert all(0 <= sampler.choose(random_logits(step)) < VOCABULARY for step in range(20))


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_bias_of_a_token_that_is_none(token: int) -> None:
    with pytest.raises(GenerationError) as caught:
        Sampler(Sampling(logit_bias={token: 1.0}), SEEN, VOCABULARY)

    assert str(caught.value) == f"`logit_bias`: token id {token} is outside the vocabulary of {VOCABULARY}"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    logits = random_logits(0)
    logits[7] = value

    with pytest.raises(GenerationError, match="the model's logits are not finite"):
        Sampler(Sampling(temperature=1.0), SEEN, VOCABULARY).choose(logits)


def test_sampling_can_be_a_key_and_is_not_changed_from_outside() -> None:
    bias = {3: 1.0}
    sampling = Sampling(logit_bias=bias)
    bias[3] = 2.0

    assert sampling.logit_bias == {3: 1.0}
    assert {sampling: 1}[Sampling(logit_bias={3: 1.0})] == 1


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
        ("typical_p", 0, "above 0 and at most 1"),
        ("typical_p", 1.5, "above 0 and at most 1"),
        ("mirostat_tau", -1, "at least 0"),
        ("mirostat_tau", float("inf"), "at least 0"),
        ("mirostat_eta", 0, "above 0"),
        ("frequency_penalty", float("nan"), "a finite number"),
        ("presence_penalty", float("inf"), "a finite number"),
        ("seed", -1, "at least 0"),
    ],
)
def test_setting_out_of_range_is_named(name: str, value: float, allowed: str) -> None:
    settings: dict[str, Any] = {name: value}
    with pytest.raises(GenerationError) as caught:
        Sampling(**settings)

    assert str(caught.value) == f"`{name}` is {value}; it must be {allowed}"


def test_bias_that_is_no_number_is_named() -> None:
    with pytest.raises(GenerationError) as caught:
        Sampling(logit_bias={5: float("nan")})

    assert str(caught.value) == "`logit_bias` is {5: nan}; it must be of finite numbers"


def test_mirostat_needs_a_temperature_and_no_filter() -> None:
    with pytest.raises(GenerationError) as caught:
        Sampling(mirostat_tau=5.0)
    assert str(caught.value) == "`mirostat_tau` needs a `temperature` above 0; 1 leaves the model's probabilities"
    for name, value in {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9}.items():
        settings: dict[str, Any] = {name: value}
        with pytest.raises(GenerationError) as caught:
            Sampling(mirostat_tau=5.0, temperature=1.0, **settings)
        assert str(caught.value) == f"`mirostat_tau` takes the place of `{name}`; leave one of them out"
