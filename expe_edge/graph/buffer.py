"""Attention for GPUs, over the whole buffer that a client keeps its cache in.

com.microsoft::GroupQueryAttention has no float32 kernel in onnxruntime's CUDA provider, and takes a bias there in late
releases alone, never over an int8 cache. MultiHeadAttention has kernels for float16 and float32, with a bias, for keys
and values as the cache holds them. So new ones are written to their places in the buffer, and queries meet all of it:
a bias hides the columns that no query sees, those that hold nothing yet among them.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MultiHeadAttention
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from expe_edge.graph.attention import GroupedAttention
from expe_edge.graph.encoding import Bias
from expe_edge.graph.floats import FloatAttention, lay_out
from expe_edge.graph.nodes import FLOAT, GraphBuilder
from expe_edge.package.contract import GraphContract, HeadGroup

#: The largest number of half precision. What is added to scores stays within it: an infinite score of a query that sees
#: no other would make NaN.
LARGEST_HALF = float(np.finfo(np.float16).max)


def columns_of(graph: GraphBuilder, contract: GraphContract) -> list[str]:
    """Append how many columns the buffers of every group have, (1,) int64."""
    pasts = contract.past_names[: 2 * len(contract.groups) : 2]
    return [graph.op("Shape", past, name="buffer.columns", start=2, end=3) for past in pasts]


class BufferedAttention(GroupedAttention):
    """Attention through MultiHeadAttention. keys: of each group, as many as its buffers have columns."""

    def __post_init__(self) -> None:
        readings = zip(self.keys, self.contract.groups, strict=True)
        self.readings = [lay_out(self.graph, self.config, self.run, keys, group) for keys, group in readings]
        self.masks = [narrow_scores(self.graph, reading.hidden, "buffer.hidden") for reading in self.readings]

    def attend(self, name: str, layer: int, group: HeadGroup, states: Sequence[str], bias: Bias | None) -> str:
        index = self.contract.groups.index(group)
        past, present = self.cache_of(layer, index)
        scales = self.scales(name, self.cache[layer], group) if self.cache else None
        reading = self.readings[index]
        attention = WholeAttention(self.graph, self.config, name, group, reading, scales, bias, self.masks[index])
        return attention.emit(states, past, present)


@dataclass(frozen=True)
class WholeAttention(FloatAttention):
    """Attention of one layer and group. mask: what is added to scores that get no bias, as the operator takes it."""

    mask: str = ""

    @property
    def cuts(self) -> list[tuple[int, int]]:
        return [(0, self.group.heads)]

    def _scaled(self, part: str, tensor: str, name: str) -> str:
        return tensor if self.scales is None else super()._scaled(part, tensor, name)

    def _restore(self, part: str, present: str, begin: int, end: int) -> str:
        del begin, end
        if self.scales is None:
            return present
        return self.graph.op("Cast", present, name=f"{self.name}.{part}.floats", to=self.graph.element)

    def _masked(self, scores: str) -> str:
        return narrow_scores(self.graph, super()._masked(scores), self.name) if scores else self.mask


def narrow_scores(graph: GraphBuilder, scores: str, name: str) -> str:
    """Append what takes float32 terms of scores to the type that is computed in, all finite."""
    if graph.element != FLOAT:
        limits = graph.scalar(-LARGEST_HALF), graph.scalar(LARGEST_HALF)
        scores = graph.op("Clip", scores, *limits, name=f"{name}.finite")
    return graph.narrow(scores, f"{name}.bias")
