"""What a package computes here, for other machines to compare with: a prompt, its greedy tokens and their logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from expe_edge.graph.run import graph_feeds
from expe_edge.package.contract import GraphContract

#: Tokens that are read at once, more than an int8 cache takes for a short run, and tokens that follow one by one.
READ, WRITTEN = 32, 24


def self_test(session: ort.InferenceSession, contract: GraphContract, tokens: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Return the manifest's `self_test` of a graph: what it continues the first of `tokens` (T,) with."""
    prompt = tokens[:READ]
    chosen: list[int] = []
    logits: list[float] = []
    run, cache = prompt, None
    for _ in range(WRITTEN):
        scores, *cache = session.run(None, graph_feeds(contract, run[None], cache))
        best = int(scores[0, -1].argmax())
        chosen.append(best)
        logits.append(round(float(scores[0, -1, best]), 6))
        run = np.array([best])
    return {"prompt": prompt.tolist(), "tokens": chosen, "logits": logits}
