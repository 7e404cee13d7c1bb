"""Padded batches are their rows alone, whatever the side, the encoding and the run."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from expe_edge.graph.build import build_graph, graph_contract
from expe_edge.graph.linears import Float32
from expe_edge.graph.run import graph_feeds
from expe_edge.model.config import ExPEConfig
from tests.graphs import open_session, random_weights
from tests.strategies import random_tokens, small_config

CONFIGS: dict[str, dict[str, Any]] = {
    "expe": {},
    "expe-paper": {"positional": "expe", "positional_parameters": {"where": "query_key"}},
    "exqpe": {"positional": "exqpe", "max_position_embeddings": 2048},
    **{name: {"positional": name} for name in ("rotary", "sinusoidal", "relative", "alibi", "none")},
}
#: Tokens of every row at first; the operator takes longer runs of several rows with nothing before them alone.
LENGTHS = (5, 9, 1)
#: Of graphs: positions folded or not, and for GPUs.
KINDS = ["folded", "inline", "buffer"]
STEPS = 3


class Batch:
    """Rows of tokens through one session, run by run as transformers does it."""

    def __init__(self, session: ort.InferenceSession, config: ExPEConfig, gpu: str | None = None) -> None:
        self.session, self.contract = session, graph_contract(config, gpu=gpu)
        self.cache: list[np.ndarray] | None = None
        self.mask = np.zeros((len(LENGTHS), 0), dtype=np.int64)

    def run(self, tokens: list[np.ndarray], *, left: bool) -> list[np.ndarray]:
        """Append tokens (t,) to each row, padded to the longest on one side; return their logits (t, V)."""
        longest = max(map(len, tokens))
        places = [slice(longest - len(row), longest) if left else slice(0, len(row)) for row in tokens]
        ids, mask = np.zeros((2, len(tokens), longest), dtype=np.int64)
        for row, place in enumerate(places):
            ids[row, place], mask[row, place] = tokens[row], 1
        self.mask = np.concatenate([self.mask, mask], axis=1)
        feeds = graph_feeds(self.contract, ids, self.cache)
        feeds["attention_mask"] = self.mask
        feeds["position_ids"] = np.maximum(self.mask.cumsum(axis=1) - 1, 0)[:, -longest:]
        logits, *self.cache = self.session.run(None, feeds)
        return [logits[row, place] for row, place in enumerate(places)]


@pytest.mark.parametrize(("folded", "gpu"), [(True, None), (False, None), (True, "float32")], ids=KINDS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_a_padded_batch_is_its_rows_alone(name: str, left: bool, folded: bool, gpu: str | None) -> None:
    config = small_config(**CONFIGS[name])
    session = open_session(build_graph(random_weights(config, folded=folded), Float32(), gpu=gpu).model)
    batch = Batch(session, config, gpu)
    texts = [random_tokens(config, length + STEPS, seed=row)[0] for row, length in enumerate(LENGTHS)]
    parts = [np.split(text, range(length, length + STEPS)) for text, length in zip(texts, LENGTHS, strict=True)]

    rows = zip(*(batch.run(list(tokens), left=left) for tokens in zip(*parts, strict=True)), strict=True)

    for text, found in zip(texts, rows, strict=True):
        alone = session.run(None, graph_feeds(graph_contract(config, gpu=gpu), text[None]))[0][0]
        np.testing.assert_allclose(np.concatenate(found), alone, rtol=0, atol=1e-4)
