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
    """last: index of each row's last key, (B,) int64. total: keys of the longest row, (1,) int64.

    operands: both as int32, which the operator takes.
    distances: appends j − i for every query i and key j, (B, 1, T, S) int64; None where keys stand at 0, 1, 2, ….
    """

    last: str
    total: str
    operands: tuple[str, str]
    distances: Callable[[], str] | None = None


def window_keys(graph: GraphBuilder, run: TokensFirst, kept: str) -> Keys:
    """Append what attention is told of keys in a window. kept: how many of each row are in the cache, (B,) int64."""
    ends = graph.op("Add", kept, run.length, name="window.ends")
    last = graph.op("Sub", ends, graph.ints(1), name="window.last")
    longest = graph.op("ReduceMax", ends, name="window.longest", keepdims=1)

    def distances() -> str:
        places = graph.op("Unsqueeze", kept, graph.ints(1), name="window.kept")
        queries = graph.op("Add", places, run.places, name="window.queries")  # (B, T)
        queries = graph.op("Unsqueeze", queries, graph.ints(1, 3), name="window.queries")
        zero, one = graph.scalar(0, np.int64), graph.scalar(1, np.int64)
        keys = graph.op("Range", zero, graph.op("Squeeze", longest, name="window.end"), one, name="window.keys")
        return graph.op("Sub", keys, queries, name="window.distances")

    return keys_of(graph, last, longest, "window", distances)


def keys_of(graph: GraphBuilder, last: str, total: str, name: str, distances: Callable[[], str] | None = None) -> Keys:
    """Append what the operator takes, and return `Keys`."""
    operands = [
        graph.op("Cast", tensor, name=f"{name}.{part}", to=int(TensorProto.INT32))
        for part, tensor in (("last", last), ("total", total))
    ]
    return Keys(last, total, (operands[0], operands[1]), distances)
