"""Loss by position, in bins that grow with the position: what changes at N shows, and what changes far beyond."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from expe_edge.divergence import Double, ratio_of_sums
from expe_edge.results import Result

#: Tokens of the first bin, and bins until the position has doubled.
FIRST_BIN = 16
BINS_PER_OCTAVE = 2


@dataclass(frozen=True)
class PositionLoss(Result):
    """One model's mean loss over the tokens predicted at positions [bin_start, bin_end), in nats per token.

    tokens: of all documents. loss_stderr: over documents.
    """

    model: str
    bin_start: int
    bin_end: int
    documents: int
    tokens: int
    loss: float
    loss_stderr: float


def bin_edges(tokens: int) -> list[int]:
    """Return the edges of bins over `tokens` positions: 0, 16, 23, 32, 45, 64, … and `tokens` itself."""
    edges = [0]
    while (edge := round(FIRST_BIN * 2 ** ((len(edges) - 1) / BINS_PER_OCTAVE))) < tokens:
        edges.append(edge)
    return [*edges, tokens]


def loss_by_position(names: Sequence[str], losses: Double) -> tuple[PositionLoss, ...]:
    """Reduce losses (models, documents, T) to the bins of every model; see `document_losses`."""
    documents, tokens = losses.shape[1:]
    results = []
    for name, of_model in zip(names, losses, strict=True):
        for start, end in pairwise(bin_edges(tokens)):
            counts = np.full(documents, float(end - start))
            loss, error = ratio_of_sums(of_model[:, start:end].sum(axis=1), counts)
            results.append(PositionLoss(name, start, end, documents, documents * (end - start), loss, error))
    return tuple(results)
