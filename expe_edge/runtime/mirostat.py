"""Mirostat 2: sampling that holds the surprise of what is chosen (Basu et al., 2021, algorithm 2)."""

from __future__ import annotations

import math

import numpy as np

from expe_edge.runtime.filters import Scores, draw

#: Target and bound never leave these, whatever is asked for, so that they stay numbers.
MOST_BITS = 1e6


class Mirostat:
    """Sampling among tokens whose surprise is not above a bound that follows the target.

    As llama.cpp has it: surprise, −log2 of the probability, is measured behind the temperature; that of the token
    drawn, which moves the bound, among the tokens that were left in.

    Attributes:
        bound: of the next token's surprise, in bits; twice the target at first.
    """

    def __init__(self, tau: float, eta: float) -> None:
        self.tau, self.eta = min(tau, MOST_BITS), min(eta, MOST_BITS)
        self.bound = min(2 * self.tau, MOST_BITS)

    def draw(self, weights: Scores, random: np.random.Generator) -> int:
        """Return the index of a token drawn by `weights` (V,), probabilities but for a factor, and move the bound."""
        least = 2.0**-self.bound * float(weights.sum(dtype=np.float64)) if self.bound > 0 else np.inf
        kept = (weights >= np.float32(min(least, float(weights.max())))).nonzero()[0]
        left = weights[kept].astype(np.float64)
        index = draw(left, random)
        error = -math.log2(left[index] / left.sum()) - self.tau
        self.bound = min(max(self.bound - self.eta * error, -MOST_BITS), MOST_BITS)
        return int(kept[index])
