"""Divergence of predictions, and means with their standard errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from expe_edge.divergence import divergence, log_softmax, ratio_of_sums

logits = arrays.arrays(np.float32, (3, 5), elements=st.floats(-50, 50, width=32))


@given(logits, logits)
def test_divergence_is_never_negative(reference: np.ndarray, other: np.ndarray) -> None:
    found = divergence(reference, other)
    assert found.shape == (3,)
    assert found.dtype == np.float64
    assert (found >= -1e-12).all()  # but for the rounding of sums that cancel


@given(logits, st.floats(-1000, 1000, width=32).filter(lambda shift: shift == round(shift)))
def test_divergence_from_the_same_distribution_is_zero_whatever_is_added_to_its_logits(
    reference: np.ndarray, shift: float
) -> None:
    shifted = (reference.astype(np.float64) + shift).astype(np.float64)
    np.testing.assert_allclose(divergence(reference, reference), 0, atol=0)
    wide = divergence(reference, shifted)  # type: ignore[arg-type]  # float32 would round the sums
    np.testing.assert_allclose(wide, 0, atol=1e-9)


def test_divergence_equals_the_sum_written_out() -> None:
    p, q = (0.5, 0.25, 0.25), (0.25, 0.25, 0.5)
    expected = 0.5 * math.log(2) + 0.25 * math.log(1) + 0.25 * math.log(0.5)
    found = divergence(np.log(p).astype(np.float32), np.log(q).astype(np.float32))
    assert found == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(0.25 * math.log(2))


def test_divergence_weighs_by_its_first_argument() -> None:
    p, q = np.log([[0.9, 0.1]], dtype=np.float32), np.log([[0.5, 0.5]], dtype=np.float32)
    assert divergence(p, q)[0] == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-5)
    assert divergence(q, p)[0] == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5), rel=1e-5)


@given(logits)
def test_log_softmax_gives_probabilities_in_the_order_of_the_logits(values: np.ndarray) -> None:
    found = log_softmax(values)
    np.testing.assert_allclose(np.exp(found).sum(axis=-1), 1, rtol=1e-12)
    differences = values.astype(np.float64) - values[..., :1]
    np.testing.assert_allclose(found - found[..., :1], differences, atol=1e-12)


def test_log_softmax_of_huge_logits_neither_overflows_nor_loses_the_difference() -> None:
    values = np.array([30000.0, 30001.0, -30000.0], dtype=np.float32)
    normalizer = math.log(1 + math.e)
    np.testing.assert_allclose(log_softmax(values), [-normalizer, 1 - normalizer, -60000 - normalizer], rtol=1e-12)


def test_ratio_of_sums_by_hand() -> None:
    """Documents of 2 and 4 tokens with sums 2 and 8: mean 10/6, residuals −4/3 and 4/3."""
    mean, error = ratio_of_sums(np.array([2.0, 8.0]), np.array([2.0, 4.0]))
    assert mean == pytest.approx(10 / 6)
    assert error == pytest.approx(math.sqrt(2 * (4 / 3) ** 2 * 2 / 1) / 6)


def test_ratio_of_sums_of_equal_documents_is_the_mean_with_its_usual_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=50)
    mean, error = ratio_of_sums(3 * values, np.full(50, 3.0))
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / math.sqrt(50))


def test_documents_that_add_nothing_change_nothing() -> None:
    sums, counts = np.array([2.0, 8.0]), np.array([2.0, 4.0])
    with_empty = ratio_of_sums(np.append(sums, [0.0, 0.0]), np.append(counts, [0.0, 0.0]))
    assert with_empty == pytest.approx(ratio_of_sums(sums, counts))


def test_one_document_has_a_mean_and_no_standard_error() -> None:
    mean, error = ratio_of_sums(np.array([6.0, 0.0]), np.array([4.0, 0.0]))
    assert mean == 1.5
    assert math.isnan(error)


def test_nothing_at_all_has_neither() -> None:
    assert all(math.isnan(value) for value in ratio_of_sums(np.zeros(3), np.zeros(3)))


def test_the_standard_error_is_how_far_repeated_samples_scatter() -> None:
    """Documents of random length whose tokens share an error, so that counting tokens as independent would fail."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(400):
        counts = random.integers(1, 200, size=60).astype(np.float64)
        found.append(ratio_of_sums(counts * random.normal(2.0, 1.0, size=60), counts))
    means, errors = np.array(found).T
    assert means.mean() == pytest.approx(2.0, abs=0.05)
    assert errors.mean() == pytest.approx(means.std(), rel=0.1)
