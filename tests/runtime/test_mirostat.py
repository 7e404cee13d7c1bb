"""Mirostat 2 against its definition, written out for sorted candidates as llama.cpp goes through them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from expe_edge.runtime.mirostat import Mirostat
from expe_edge.runtime.sampling import Sampler, Sampling


def kept_and_surprise(logits: np.ndarray, bound: float) -> dict[int, float]:
    """The candidates that a bound leaves in, and the surprise of each among them, in bits."""
    probabilities = np.exp(logits.astype(np.float64) - logits.max())
    probabilities /= probabilities.sum()
    kept: list[int] = []
    for token in np.argsort(-probabilities, kind="stable").tolist():
        if kept and -math.log2(probabilities[token]) > bound:
            break
        kept.append(token)
    share = probabilities[kept].sum()
    return {token: -math.log2(probabilities[token] / share) for token in kept}


def logits_of(step: int) -> np.ndarray:
    """Logits (V,) of a step, now peaked, now flat."""
    random = np.random.default_rng(step)
    logits: np.ndarray = (random.standard_normal(300) * random.choice([0.5, 2.0, 5.0])).astype(np.float32)
    return logits


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize(("tau", "eta"), [(1.0, 0.1), (3.0, 0.5), (5.0, 1.0), (0.01, 0.1)])
def test_every_step_is_that_of_the_definition(tau: float, eta: float, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, mirostat_tau=tau, mirostat_eta=eta, seed=3)
    sampler = Sampler(sampling, np.array([0]), 300)
    bound, sizes = 2 * tau, set()
    assert sampler.mirostat is not None

    for step in range(200):
        assert sampler.mirostat.bound == pytest.approx(bound, abs=1e-3)
        logits = logits_of(step)
        left = kept_and_surprise(logits / np.float32(temperature), bound)
        token = sampler.choose(logits)
        assert token in left
        bound -= eta * (left[token] - tau)
        sizes.add(len(left))

    assert (len(sizes) > 1) is (tau > 0.1)  # the bound cuts, now here, now there; or leaves the best alone


def test_candidates_are_drawn_as_often_as_their_probability_says() -> None:
    weights = np.array([1.0, 0.5, 0.25, 0.01], dtype=np.float32)
    random, counts = np.random.default_rng(0), np.zeros(4)

    for _ in range(4000):
        counts[Mirostat(1.45, 0.1).draw(weights, random)] += 1  # of at most 2.9 bits: the first three

    assert counts[3] == 0
    np.testing.assert_allclose(counts[:3] / 4000, np.array([4, 2, 1]) / 7, atol=0.03)


@pytest.mark.parametrize("tau", [2.0, 4.0])
def test_mean_surprise_meets_the_target(tau: float) -> None:
    """Over texts of one flat distribution, of 8.2 bits, which untruncated sampling would show."""
    sampler = Sampler(Sampling(temperature=1.0, mirostat_tau=tau, seed=0), np.array([0]), 300)
    logits = (np.random.default_rng(0).standard_normal(300) * 0.1).astype(np.float32)
    surprises = []
    for _ in range(2000):
        assert sampler.mirostat is not None
        left = kept_and_surprise(logits, sampler.mirostat.bound)
        surprises.append(left[sampler.choose(logits)])

    assert np.mean(surprises[200:]) == pytest.approx(tau, abs=0.2)


@pytest.mark.parametrize("without", [1e300, 10**400])
def test_settings_without_measure_stay_numbers(without: float) -> None:
    sampling = Sampling(temperature=1.0, mirostat_tau=without, mirostat_eta=without, seed=0)
    sampler = Sampler(sampling, np.array([0]), 300)
    with np.errstate(all="raise", under="ignore"):
        assert all(0 <= sampler.choose(logits_of(step)) < 300 for step in range(20))
