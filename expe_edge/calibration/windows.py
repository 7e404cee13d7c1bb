"""Windows for the heads whose scores fall with distance: which heads may have one, and what that costs.

Heads with slopes are trained on N tokens and see little beyond; content heads are what reads far text. So the keys and
values of the former are worth keeping for a window alone, and measured on text that costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from expe_edge.divergence import log_divergence, log_softmax
from expe_edge.errors import ExportError
from expe_edge.graph.build import build_graph, graph_contract
from expe_edge.graph.linears import Float32
from expe_edge.graph.run import logits_of, open_graph
from expe_edge.graph.weights import ModelWeights
from expe_edge.positions.expe import ExPEParameters

Double = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """The window of every key/value head, 0 for all tokens.

    tokens: of each text that they were measured on, by the float32 model. loss: nats per token that they add there,
        below 0 where they help. kl: the divergence from the model without.
    """

    windows: tuple[int, ...]
    tokens: int
    loss: float
    kl: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return asdict(self)


def head_windows(weights: ModelWeights, window: int) -> tuple[int, ...]:
    """Return the window of every key/value head: none where a content head shares it.

    Raises:
        ExportError: the encoding's scores are not of distances alone, or all heads would have one, or none.
    """
    config, parameters = weights.config, weights.config.encoding_parameters
    if not (isinstance(parameters, ExPEParameters) and parameters.relative and parameters.code.limbs == 1):
        raise ExportError(f"`head_window` is for the relative form of expe, not {config.positional}; drop it")
    if not weights.folded:
        raise ExportError("`head_window` needs `positions` folded; inline they are in the keys")
    content = np.array(parameters.content(config.num_attention_heads)).reshape(config.num_key_value_heads, -1)
    sees_all = [bool(heads.any()) for heads in content]
    if all(sees_all) or not any(sees_all):
        which = "every key/value head" if all(sees_all) else "no head"
        raise ExportError(f"`head_window`: {which} of this model sees content at any distance; drop it")
    return tuple(0 if everything else window for everything in sees_all)


def measure_windows(weights: ModelWeights, windows: Sequence[int], texts: Sequence[Ids]) -> Windows:
    """Return what windows cost the float32 model on `texts` (T,), all of one length."""
    sessions = [
        (open_graph(build_graph(weights, Float32(), windows=each).model), graph_contract(weights.config, windows=each))
        for each in ((), windows)
    ]
    losses, divergences = [], []
    for text in texts:
        runs = [logits_of(session, contract, text, 0) for session, contract in sessions]
        begin = 1
        for logits in zip(*runs, strict=True):
            whole, windowed = map(log_softmax, logits)
            targets = text[begin : begin + len(whole)]
            chosen = np.arange(len(targets)), targets
            losses.append(whole[chosen] - windowed[chosen])
            divergences.append(log_divergence(whole, windowed))
            begin += len(whole)
    return Windows(
        windows=tuple(windows),
        tokens=len(texts[0]),
        loss=float(np.concatenate(losses).mean()),
        kl=float(np.concatenate(divergences).mean()),
    )
