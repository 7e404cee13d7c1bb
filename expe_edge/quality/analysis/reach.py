"""How far back each head looks, exact from its attention weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expe_edge.divergence import Double
from expe_edge.results import Result

#: The first tokens of a text, which heads attend to for want of anything else, are not counted as far text.
SINKS = 16
#: Share of a query's attention that may lie beyond its reach.
TAIL = 1e-3


@dataclass(frozen=True)
class HeadReach(Result):
    """How far one head looks, over the queries of the second half of every text.

    layer, head: from 1. reach: the least distance beyond which no more than `TAIL` of a query's attention lies, the
    first `SINKS` tokens left out; median and 90 % quantile over queries, in tokens. sinks: share of attention on those
    first tokens. entropy: of the attention to all tokens, in nats. Both are means over queries.
    """

    layer: int
    head: int
    queries: int
    reach_median: int
    reach_90: int
    sinks: float
    entropy: float


class Reached(NamedTuple):
    """Figures of consecutive queries of every head, each (H, t)."""

    reach: npt.NDArray[np.int64]
    sinks: Double
    entropy: Double


def first_query(length: int) -> int:
    """Return the first query of a text of `length` tokens that is measured: half of them are before it."""
    return max(length // 2, SINKS)


def reached(blocks: Iterable[tuple[int, Tensor]]) -> Reached:
    """Measure weights (H, t, S) of blocks of queries, each with the place of its first query, `SINKS` at least."""
    parts = [_reached(begin, weights) for begin, weights in blocks]
    return Reached(*(torch.cat(figures, dim=1).cpu().numpy() for figures in zip(*parts, strict=True)))


def _reached(begin: int, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Keys that may be cut off, the oldest first: as long as what they get together is no more than `TAIL`.
    cut = (weights[..., SINKS:].cumsum(dim=-1) <= TAIL).sum(dim=-1)
    queries = torch.arange(begin, begin + weights.shape[1], device=weights.device)
    reach = (queries - SINKS - cut).clamp(min=0)  # 0 too where even the query's own token gets no more than that
    return reach, weights[..., :SINKS].sum(dim=-1).double(), torch.special.entr(weights).sum(dim=-1).double()


def head_reaches(layer: int, observed: Sequence[Reached]) -> list[HeadReach]:
    """Reduce one layer's figures of all documents to those of its heads."""
    reach, sinks, entropy = (np.concatenate(figures, axis=1) for figures in zip(*observed, strict=True))
    median, most = np.quantile(reach, (0.5, 0.9), axis=1, method="inverted_cdf")
    return [
        HeadReach(
            layer=layer,
            head=head + 1,
            queries=reach.shape[1],
            reach_median=int(median[head]),
            reach_90=int(most[head]),
            sinks=float(sinks[head].mean()),
            entropy=float(entropy[head].mean()),
        )
        for head in range(len(reach))
    ]
