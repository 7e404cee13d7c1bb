"""The linear probe for position: planted positions, noise, and the regression done the direct way."""

from __future__ import annotations

import numpy as np
import pytest

from expe_edge.quality.analysis.position_probe import PENALTIES, PositionSums, ridge, squared_errors

N, T, C, DOCUMENTS = 64, 160, 12, 8


def documents(planted: str | None = None, count: int = DOCUMENTS, length: int = T) -> list[np.ndarray]:
    """Noise, (T, C), with the position or its logarithm spread over the dimensions."""
    generator = np.random.default_rng(0)
    direction, n = generator.normal(size=C), np.arange(length)
    signal = {None: 0 * n, "n": n / 10, "log n": np.log1p(n)}[planted]
    noise = [generator.normal(size=(length, C)) for _ in range(count)]
    return [
        each - np.outer(each @ direction, direction) / (direction @ direction) + np.outer(signal, direction)
        for each in noise
    ]


def sums_of(texts: list[np.ndarray]) -> PositionSums:
    sums = PositionSums(1, len(texts), C, N)
    for number, text in enumerate(texts):
        sums.add(1, number, text)
    return sums


def test_a_planted_position_is_read_off_within_and_beyond() -> None:
    result = sums_of(documents("n")).result(1)

    assert (result.layer, result.documents) == (1, DOCUMENTS)
    assert (result.position_within, result.position_beyond) == pytest.approx((1, 1), abs=1e-6)
    assert 0 < result.log_position_within < 0.9


def test_a_planted_logarithm_is_read_off_within_and_beyond() -> None:
    result = sums_of(documents("log n")).result(1)

    assert (result.log_position_within, result.log_position_beyond) == pytest.approx((1, 1), abs=1e-6)
    assert 0 < result.position_within < 0.9


def test_noise_says_nothing_of_positions() -> None:
    result = sums_of(documents(count=24)).result(1)

    assert (result.position_within, result.log_position_within) == pytest.approx((0, 0), abs=0.02)
    assert max(result.position_beyond, result.log_position_beyond) < -1  # the mean within N is far from that beyond


def test_texts_of_n_tokens_have_nothing_beyond() -> None:
    values = sums_of(documents("n", length=N)).result(1).to_dict()

    assert values["position_within"] == pytest.approx(1)
    assert values["position_beyond"] is values["log_position_beyond"] is None


def test_what_holds_in_one_document_alone_is_not_position() -> None:
    """That documents are tested with weights of others: in each the position lies in a dimension of its own."""
    texts = documents(count=4)
    for number, text in enumerate(texts):
        text[:, number] += np.arange(T)

    assert sums_of(texts).result(1).position_within < 0.1


def directly(text: list[np.ndarray], penalty: float) -> np.ndarray:
    """Weights (C + 1, 2) of ridge regression as least squares of centred states with rows for the penalty."""
    states = np.concatenate([each[:N] for each in text])
    targets = np.concatenate([targets_of(N) for _ in text])
    centred = states - states.mean(axis=0)
    scaled = penalty * centred.var(axis=0).mean() * len(states)
    rows = np.concatenate([centred, np.sqrt(scaled) * np.eye(C)])
    wanted = np.concatenate([targets - targets.mean(axis=0), np.zeros((C, 2))])
    weights = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return np.concatenate([weights, [targets.mean(axis=0) - states.mean(axis=0) @ weights]])


def targets_of(length: int) -> np.ndarray:
    n = np.arange(length)
    return np.stack([n / N, np.log1p(n)], axis=1)


def predicted(text: np.ndarray, weights: np.ndarray) -> np.ndarray:
    found: np.ndarray = text @ weights[:-1] + weights[-1]
    return found


def weakly_planted() -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [text + generator.normal(0, 8, size=text.shape) for text in documents("n", count=5)]


def test_ridge_is_penalized_least_squares() -> None:
    texts = weakly_planted()
    found = ridge(sums_of(texts).sums[1, :, 0].sum(axis=0))

    for weights, penalty in zip(found, PENALTIES, strict=True):
        np.testing.assert_allclose(weights, directly(texts, penalty), rtol=1e-6, atol=1e-9)


def test_errors_are_those_of_the_predictions() -> None:
    texts = weakly_planted()
    sums, weights = sums_of(texts).sums[1], ridge(sums_of(texts).sums[1, 1, 0])

    found = squared_errors(sums[:, 1].sum(axis=0), weights)
    expected = [sum(((predicted(t, w) - targets_of(T))[N:] ** 2).sum(axis=0) for t in texts) for w in weights]
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_the_whole_probe_by_hand() -> None:
    """Five documents in four folds: the first and the last are one."""
    texts = weakly_planted()
    folds = [[texts[0], texts[4]], [texts[1]], [texts[2]], [texts[3]]]
    left, total = np.zeros((2, 2)), np.zeros((2, 2))
    for fold, tested in enumerate(folds):
        fitted = [text for other in (2, 3) for text in folds[(fold + other) % 4]]
        candidates = [directly(fitted, penalty) for penalty in PENALTIES]
        choosing = folds[(fold + 1) % 4]
        errors = [sum((predicted(t, w) - targets_of(T))[:N] ** 2 for t in choosing).sum(axis=0) for w in candidates]
        best = np.argmin(errors, axis=0)
        for target in range(2):
            for span, part in enumerate((slice(0, N), slice(N, T))):
                wanted = np.concatenate([targets_of(T)[part, target]] * len(tested))
                given = np.concatenate([predicted(t, candidates[best[target]])[part, target] for t in tested])
                left[span, target] += ((wanted - given) ** 2).sum()
                total[span, target] += ((wanted - wanted.mean()) ** 2).sum()
    expected = 1 - left / total
    result = sums_of(texts).result(1)

    assert (result.position_within, result.log_position_within) == pytest.approx(tuple(expected[0]))
    assert (result.position_beyond, result.log_position_beyond) == pytest.approx(tuple(expected[1]))
    assert 0.1 < result.position_within < 0.9
