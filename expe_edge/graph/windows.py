"""The keys that a group of heads sees, as nodes: all of a row, or those that a client keeps of a window.

Distances need no positions: the last key of a row is that of its last token, wherever in the text that stands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from expe_edge.graph.nodes import GraphBuilder
from expe_edge.graph.padding import TokensFirst


@dataclass(frozen=True)
class Keys:
    """last: index of each row's last key, (B,) int64. total: how many keys there are, (1,) int64.

    They are those of the longest row, or all that a buffer has room for.
    distances: appends j − i for every query i and key j, (B, 1, T, S) int64; None where keys stand at 0, 1, 2, ….
    """

    name: str
    last: str
    total: str
    distances: Callable[[], str] | None = None

    def operands(self, graph: GraphBuilder) -> list[str]:
        """Append both as int32, as GroupQueryAttention takes them."""
        parts = (("last", self.last), ("total", self.total))
        return [
            graph.op("Cast", tensor, name=f"{self.name}.{part}", to=int(TensorProto.INT32)) for part, tensor in parts
        ]


def window_keys(graph: GraphBuilder, run: TokensFirst, kept: str, columns: str = "") -> Keys:
    """Append what attention is told of keys in a window.

    kept: how many of each row are in the cache, (B,) int64. columns: how many keys there are, (1,) int64; empty for
        those of the longest row.
    """
    ends = graph.op("Add", kept, run.length, name="window.ends")
    last = graph.op("Sub", ends, graph.ints(1), name="window.last")
    total = columns or graph.op("ReduceMax", ends, name="window.longest", keepdims=1)

    def distances() -> str:
        places = graph.op("Unsqueeze", kept, graph.ints(1), name="window.kept")
        queries = graph.op("Add", places, run.places, name="window.queries")  # (B, T)
        queries = graph.op("Unsqueeze", queries, graph.ints(1, 3), name="window.queries")
        zero, one = graph.scalar(0, np.int64), graph.scalar(1, np.int64)
        keys = graph.op("Range", zero, graph.op("Squeeze", total, name="window.end"), one, name="window.keys")
        return graph.op("Sub", keys, queries, name="window.distances")

    return Keys("window", last, total, distances)
