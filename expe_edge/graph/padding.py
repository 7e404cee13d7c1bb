"""Padding on the left, as nodes: the tokens of a run stand before its padding while the model computes.

GroupQueryAttention takes it that a row's keys begin with a token; transformers and its like pad a batch on the left. So
rows are rolled until their tokens come first, and what the model makes of them is rolled back. Padding is then appended
after a row's last token: no token before it sees it, and the next run writes over it. Rows whose last column is no
token, as in batches that are padded on the right, stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from expe_edge.graph.nodes import GraphBuilder


@dataclass
class AsGiven:
    """A run whose rows stay as they are. token_ids, positions: tensors (B, T) int64."""

    graph: GraphBuilder
    token_ids: str = field(init=False, default="input_ids")
    positions: str = field(init=False, default="position_ids")

    def restore(self, hidden: str) -> str:
        """Append what gives rows (B, T, C) their place among the inputs again."""
        return hidden


@dataclass
class TokensFirst(AsGiven):
    """Rolls each row (T,) of a run by the padding before its tokens, which then stand first in `token_ids`.

    last, total: index of each row's last key (B,), and the longest row (1,), int64.
    """

    last: str = field(init=False)
    total: str = field(init=False)
    #: T, (1,) int64, and the places of its tokens, (T,) int64.
    length: str = field(init=False)
    places: str = field(init=False)

    def __post_init__(self) -> None:
        graph = self.graph
        self.length = length = graph.op("Shape", "input_ids", name="run.length", start=1, end=2)
        padding = graph.op("Unsqueeze", self._padding(length), graph.ints(1), name="run.padding")  # (B, 1)
        zero, one = graph.scalar(0, np.int64), graph.scalar(1, np.int64)
        end = graph.op("Squeeze", length, name="run.end")
        self.places = graph.op("Range", zero, end, one, name="run.places")
        ahead = graph.op("Mod", graph.op("Add", self.places, padding), length, name="run.tokens_first")  # (B, T)
        behind = graph.op("Mod", graph.op("Sub", self.places, padding), length, name="run.as_given")
        self.restored = graph.op("Unsqueeze", behind, graph.ints(2), name="run.as_given")
        self.token_ids = graph.op("GatherElements", "input_ids", ahead, name="run.token_ids", axis=1)
        self.positions = graph.op("GatherElements", "position_ids", ahead, name="run.positions", axis=1)

    def _padding(self, length: str) -> str:
        """Padding before the tokens of every row of the run, (B,) int64; beside it, the operator's lengths."""
        graph = self.graph
        begin = graph.op("Neg", length, name="run.begin")
        run = graph.op(
            "Slice", "attention_mask", begin, graph.ints(np.iinfo(np.int64).max), graph.ints(1), name="run.mask"
        )
        tokens = graph.op("ReduceSum", run, graph.ints(1), name="run.tokens", keepdims=0)
        ends = graph.op("Gather", "attention_mask", graph.scalar(-1, np.int64), name="run.ends", axis=1)
        padding = graph.op("Mul", graph.op("Sub", length, tokens), ends, name="run.padding")
        seen = graph.op("ReduceSum", "attention_mask", graph.ints(1), name="lengths.tokens", keepdims=0)
        keys = graph.op("Add", seen, padding, name="lengths.keys")
        self.last = graph.op("Sub", keys, graph.ints(1), name="lengths.last")
        self.total = graph.op("Shape", "attention_mask", name="lengths.total", start=1, end=2)
        return padding

    def restore(self, hidden: str) -> str:
        return self.graph.op("GatherND", hidden, self.restored, name="run.restored", batch_dims=1)
