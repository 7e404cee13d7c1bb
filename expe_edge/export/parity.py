"""Validation of a graph on one long sequence, by prefill and by cached decode, before it is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from expe_edge.divergence import log_divergence, log_softmax
from expe_edge.errors import ExportError
from expe_edge.graph.run import DECODED, check_contract, logits_of
from expe_edge.package.contract import GraphContract

Float = npt.NDArray[np.float32]

#: Difference of logits that a float32 graph may typically show, in units of max(1, largest logit / 16): float32 keeps
#: 24 bits, and logits beyond 16 have that much less after the point.
FLOAT_TOLERANCE = 1e-4
#: How much farther off the worst logit may be: a token whose attention wavers between two others shows rounding most.
OUTLIERS = 10
#: Rows of logits taken to float64 at once: with 32,000 tokens, 8 MB for each of the arrays that a divergence needs.
DOUBLE_ROWS = 32
#: How much more is allowed where positions stay inside the products: float32 itself loses the content beside them.
INLINE_ALLOWANCE = 1000


@dataclass(frozen=True)
class Parity:
    """Differences between a graph and its reference, logits (T, V) of one sequence of `tokens` tokens.

    prefill_max, decode_max: largest absolute difference. mean_kl: nats per token, the reference's distribution to
    the graph's.
    """

    tokens: int
    prefill_max: float
    decode_max: float
    largest_logit: float
    mean_kl: float

    def to_dict(self) -> dict[str, float]:
        """Plain data for the manifest."""
        return asdict(self)


class ByToken(NamedTuple):
    """Of every token of the sequence but the first, (T − 1,): the graph's loss and its divergence there, in nats."""

    nats: npt.NDArray[np.float64]
    kl: npt.NDArray[np.float64]


def measure_parity(
    expected: Iterable[Float], session: ort.InferenceSession, contract: GraphContract, tokens: npt.NDArray[np.int64]
) -> tuple[Parity, ByToken]:
    """Run `tokens` (T,), more than `DECODED`, through a graph; compare with logits of `parts_of` them.

    Raises:
        ExportError: the graph breaks the contract.
    """
    check_contract(session, contract)
    differences, largest, divergences, nats = [], [], [], []
    targets = iter(np.append(tokens[1:], 0))  # what the last one predicts is left out below
    for reference, found in zip(expected, logits_of(session, contract, tokens), strict=True):
        differences.append(np.abs(found - reference).max())
        largest.append(np.abs(reference).max())
        for at in _rows(len(found)):
            wanted, predicted = log_softmax(reference[at]), log_softmax(found[at])
            divergences.append(log_divergence(wanted, predicted))
            nats += [-row[target] for row, target in zip(predicted, targets, strict=False)]
    kl = np.concatenate(divergences)
    parity = Parity(
        tokens=len(tokens),
        prefill_max=float(np.max(differences[:-DECODED])),
        decode_max=float(np.max(differences[-DECODED:])),
        largest_logit=float(np.max(largest)),
        mean_kl=float(kl.mean()),
    )
    return parity, ByToken(np.array(nats)[:-1], kl[:-1])


def _rows(count: int) -> list[slice]:
    """Return runs of rows few enough to be taken to float64 at once."""
    return [slice(begin, begin + DOUBLE_ROWS) for begin in range(0, count, DOUBLE_ROWS)]


def require_parity(parity: Parity, precision: str, *, folded: bool, exact: bool) -> None:
    """Raise `ExportError` where logits are not finite, or those of an `exact` graph differ by more than rounding."""
    worst = float(np.maximum(parity.prefill_max, parity.decode_max))  # NaN where either is
    if not np.isfinite([worst, parity.mean_kl]).all():
        raise ExportError(f"{precision}: the graph gives NaN or infinite logits; export float32 and compare by layer")
    if not exact:
        return
    typical = float(np.sqrt(2 * max(parity.mean_kl, 0.0)))  # logits off by δ make a divergence of about δ²/2
    allowed = float_tolerance(parity.largest_logit, folded=folded)
    for how, distance, limit in (("typically", typical, allowed), ("at worst", worst, OUTLIERS * allowed)):
        if distance > limit:
            raise ExportError(
                f"{precision}: logits differ from the reference {how} by {distance:.2g}, more than {limit:.2g}"
            )


def float_tolerance(largest_logit: float, *, folded: bool) -> float:
    """Return by how much logits may typically differ between two ways of computing them in float32."""
    return FLOAT_TOLERANCE * max(1.0, largest_logit / 16) * (1 if folded else INLINE_ALLOWANCE)
