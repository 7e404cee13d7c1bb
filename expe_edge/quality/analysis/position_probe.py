"""A linear probe for position: how well ridge regression reads a token's position off the residual stream.

Documents are dealt into folds. Each fold is tested with weights that were fitted on the others but one, and a penalty
that did best on that one; what is fitted lies within N alone. All is computed from sums of products, so that no states
are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from expe_edge.divergence import Double
from expe_edge.results import Result

#: Most folds; of fewer documents each is one. Three are needed: to fit, to choose the penalty, to test.
MOST_FOLDS, FEWEST_FOLDS = 4, 3
#: Penalties, in units of the mean variance of a dimension.
PENALTIES = np.logspace(-8, 2, 21)
#: Columns beside the states: a constant, the position, its logarithm.
BESIDE = 3


@dataclass(frozen=True)
class PositionProbe(Result):
    """R² of the position n, and of log(1 + n), as read off the residual stream behind `layer` of unseen documents.

    layer: from 1, 0 for the embeddings. within: over tokens within N. beyond: over those from N on, by weights fitted
    within N; NaN, null in JSON, where the text ends at N. 1 is perfect, 0 no better than the mean position of the
    range, below 0 worse.
    """

    layer: int
    documents: int
    position_within: float
    position_beyond: float
    log_position_within: float
    log_position_beyond: float


class PositionSums:
    """Products of states and positions, summed by layer, fold, and range: within N and beyond."""

    def __init__(self, layers: int, documents: int, width: int, training_length: int) -> None:
        self.documents, self.training_length = documents, training_length
        self.folds = min(MOST_FOLDS, documents)
        self.sums = np.zeros((layers + 1, self.folds, 2, width + BESIDE, width + BESIDE))

    def add(self, layer: int, document: int, states: Double) -> None:
        """Take in the residual stream (T, C) behind `layer`."""
        positions = np.arange(len(states))
        targets = np.stack([np.ones(len(states)), positions / self.training_length, np.log1p(positions)], axis=1)
        columns = np.concatenate([states, targets], axis=1)
        for products, part in zip(
            self.sums[layer, document % self.folds], np.split(columns, [self.training_length]), strict=True
        ):
            products += part.T @ part

    def result(self, layer: int) -> PositionProbe:
        """Fit, choose and test."""
        (position_within, log_within), (position_beyond, log_beyond) = r_squared(self.sums[layer]).tolist()
        return PositionProbe(layer, self.documents, position_within, position_beyond, log_within, log_beyond)


def r_squared(sums: Double) -> Double:
    """Return R² by range and target, (2, 2), of products (folds, 2, C + 3, C + 3); see `PositionSums`."""
    folds = len(sums)
    left, total = np.zeros((2, 2)), np.zeros((2, 2))
    for fold in range(folds):
        choosing = (fold + 1) % folds
        fitting = [other for other in range(folds) if other not in (fold, choosing)]
        weights = ridge(sums[fitting, 0].sum(axis=0))  # (penalties, C + 1, 2)
        best = np.argmin(squared_errors(sums[choosing, 0], weights), axis=0)
        chosen = np.stack([weights[penalty, :, target] for target, penalty in enumerate(best)], axis=1)
        for span, products in enumerate(sums[fold]):
            left[span] += squared_errors(products, chosen[None])[0]
            total[span] += _squares_about_mean(products)
    unexplained: Double = np.divide(left, total, out=np.full((2, 2), np.nan), where=total > 0)
    return 1 - unexplained


def ridge(products: Double) -> Double:
    """Return the weights of ridge regression for every penalty, the constant last, (penalties, C + 1, 2).

    Closed form, of centred states, by the eigenvalues of their covariance; the constant is not penalized.
    """
    moments = products / products[-BESIDE, -BESIDE]
    mean, targets = moments[:-BESIDE, -BESIDE], moments[-BESIDE, -2:]
    covariance = moments[:-BESIDE, :-BESIDE] - np.outer(mean, mean)
    values, vectors = np.linalg.eigh(covariance)
    along = vectors.T @ (moments[:-BESIDE, -2:] - np.outer(mean, targets))
    penalties = PENALTIES * max(values.mean(), np.finfo(np.float64).tiny)
    weights = vectors @ (along / (np.maximum(values, 0) + penalties[:, None])[..., None])
    return np.concatenate([weights, (targets - mean @ weights)[:, None]], axis=1)


def squared_errors(products: Double, weights: Double) -> Double:
    """Return the summed squared errors of weights (…, C + 1, 2) over the tokens of `products`, (…, 2)."""
    errors = [
        np.concatenate([weights[..., target], np.tile(-np.eye(2)[target], (len(weights), 1))], axis=1)
        for target in range(2)
    ]
    return np.stack([np.maximum(np.einsum("pi,ij,pj->p", e, products, e, optimize=True), 0) for e in errors], axis=-1)


def _squares_about_mean(products: Double) -> Double:
    """Return the summed squares of both targets about their means, (2,)."""
    count = products[-BESIDE, -BESIDE]
    squares: Double = np.diag(products)[-2:]
    return squares - products[-BESIDE, -2:] ** 2 / count if count else np.zeros(2)
