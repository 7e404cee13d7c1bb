"""How steeply attention falls with distance, by head, over the queries of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from expe_edge.divergence import Float
from expe_edge.results import Result

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class HeadSlopes(Result):
    """Slopes of one head, what its scores lose by each token of distance, in nats; below zero, it prefers far tokens.

    layer, head: from 1. limb: of ExQPE's code, from 0, None of a code of one; its slope is in nats per position, so
    that limbs which together measure the distance have one slope. quantiles: over queries, of `QUANTILES`; all the same
    where the slope is a constant, as ALiBi's. negative: share of queries whose slope is below zero.
    """

    layer: int
    head: int
    limb: int | None
    quantiles: tuple[float, ...]
    negative: float

    @property
    def constant(self) -> bool:
        """Whether all queries have one slope."""
        return self.quantiles[0] == self.quantiles[-1]


def head_slopes(layer: int, observed: Sequence[Float]) -> list[HeadSlopes]:
    """Reduce one layer's slopes of all documents, (H, T, G) each, to the figures of its heads; of none, to none."""
    if not observed:
        return []
    together = np.concatenate(observed, axis=1)
    quantiles = np.quantile(together, QUANTILES, axis=1)  # (5, H, G)
    negative = (together < 0).mean(axis=1)
    heads, limbs = negative.shape
    return [
        HeadSlopes(
            layer=layer,
            head=head + 1,
            limb=limb if limbs > 1 else None,
            quantiles=tuple(quantiles[:, head, limb].tolist()),
            negative=float(negative[head, limb]),
        )
        for head in range(heads)
        for limb in range(limbs)
    ]
