"""An int8 cache read as floats, for runs of many tokens: onnxruntime's attention over int8 restores every key for each
query, which many queries would pay for many times over.

A run of many tokens rounds its keys and values and writes them to the cache as the operator does, then restores
what the cache holds, a few heads at a time, and attends in float32. What it sees is what the operator sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from expe_edge.graph.encoding import Bias, split
from expe_edge.graph.nodes import MICROSOFT, GraphBuilder
from expe_edge.graph.padding import TokensFirst
from expe_edge.graph.windows import Keys
from expe_edge.model.config import ExPEConfig
from expe_edge.package.contract import FLOAT_HEADS, FLOATS_FROM, MANY_TOKENS, GraphContract, HeadGroup

#: What is added to the score of a key that a query does not see. Finite: a row of padding alone sees none.
HIDDEN = float(np.finfo(np.float32).min)


class Reading(NamedTuple):
    """What all layers share of a group of heads.

    total: how many keys there are, (1,) int64.
    hidden: 0 where a query sees a key and `HIDDEN` elsewhere, (B, 1, H/Hkv·T, S) float32.
    places: row, head and column of the cache where each new key goes, (B, heads, T, 3) int64.
    """

    total: str
    hidden: str
    places: str


class Scales(NamedTuple):
    """Names of what a level is worth in the keys and in the values of a group, (1, heads, 1, D)."""

    key: str
    value: str


@dataclass
class FloatReading:
    """Appends what all layers share where an int8 cache may be read as floats.

    It needs room in the cache, which a client has that gives one buffer for past and present. How many tokens are many
    a client may say.

    Attributes:
        many: whether a run is one of many tokens that have such room, (1,) bool. readings: of every group.
    """

    graph: GraphBuilder
    config: ExPEConfig
    contract: GraphContract
    keys: Sequence[Keys]
    run: TokensFirst

    def __post_init__(self) -> None:
        graph = self.graph
        least = graph.optional(FLOATS_FROM, MANY_TOKENS)
        self.many = graph.op("GreaterOrEqual", self.run.length, least, name="floats.many")
        for index, keys in enumerate(self.keys):
            capacity = graph.op("Shape", self.contract.past_names[2 * index], name="floats.capacity", start=2, end=3)
            room = graph.op("GreaterOrEqual", capacity, keys.total, name="floats.room")
            self.many = graph.op("And", self.many, room, name="floats.chosen")
        self.readings = self._prepare()

    def _prepare(self) -> list[Reading]:
        """Append what all layers share, computed in runs of many tokens alone."""
        graph, readings = self.graph, []
        many, few = graph.branch(), graph.branch()
        for keys, group in zip(self.keys, self.contract.groups, strict=True):
            reading = lay_out(many, self.config, self.run, keys, group)
            for tensor, dtype in zip(reading[1:], ("float32", "int64"), strict=True):
                many.result(tensor, dtype)
                nothing = graph.constant(np.zeros((0,) * 4, dtype))
                few.result(few.op("Identity", nothing, name="floats.unused"), dtype)
            readings.append(Reading(keys.total, graph.tensor(), graph.tensor()))
        outputs = [tensor for reading in readings for tensor in (reading.hidden, reading.places)]
        graph.choose(self.many, many, few, outputs, name="floats.prepared")
        return readings


def lay_out(graph: GraphBuilder, config: ExPEConfig, run: TokensFirst, keys: Keys, group: HeadGroup) -> Reading:
    """Append which keys of a group no query sees, and where new ones go."""
    before = graph.op("Sub", graph.op("Add", keys.last, graph.ints(1)), run.length, name="floats.before")
    before = graph.op("Max", before, graph.ints(0), name="floats.begin")  # rows of a prompt may be padded
    queries = graph.op("Add", graph.op("Unsqueeze", before, graph.ints(1)), run.places, name="floats.queries")
    zero, one = graph.scalar(0, np.int64), graph.scalar(1, np.int64)
    columns = graph.op("Range", zero, graph.op("Squeeze", keys.total), one, name="floats.columns")
    column = graph.op("Unsqueeze", queries, graph.ints(2), name="floats.queries")  # (B, T, 1)
    visible = graph.op("LessOrEqual", columns, column, name="floats.causal")
    if group.window:
        begin = graph.op("Sub", column, graph.ints(group.window), name="floats.window")
        visible = graph.op("And", visible, graph.op("Greater", columns, begin), name="floats.seen")
    hidden = graph.op("Where", visible, graph.scalar(0.0), graph.scalar(HIDDEN), name="floats.hidden")
    hidden = graph.op("Unsqueeze", hidden, graph.ints(1), name="floats.hidden")
    shared = config.num_attention_heads // config.num_key_value_heads
    if shared > 1:
        hidden = graph.op("Tile", hidden, graph.ints(1, 1, shared, 1), name="floats.hidden")
    return Reading(keys.total, hidden, _places(graph, group, run, queries))


def _places(graph: GraphBuilder, group: HeadGroup, run: TokensFirst, queries: str) -> str:
    """Where new keys go, (B, heads, T, 3): ScatterND's indices, of the columns (B, T) of every row."""
    rows = graph.op("Shape", queries, name="floats.rows", start=0, end=1)
    shape = graph.op("Concat", rows, graph.ints(group.heads), run.length, graph.ints(1), axis=0)
    zero, one = graph.scalar(0, np.int64), graph.scalar(1, np.int64)
    row = graph.op("Range", zero, graph.op("Squeeze", rows), one, name="floats.row")
    row = graph.op("Unsqueeze", row, graph.ints(1, 2, 3), name="floats.row")
    head = graph.constant(np.arange(group.heads, dtype=np.int64)[:, None, None])
    column = graph.op("Unsqueeze", queries, graph.ints(1, 3), name="floats.column")
    parts = [graph.op("Expand", part, shape, name="floats.place") for part in (row, head, column)]
    return graph.op("Concat", *parts, name="floats.places", axis=-1)


@dataclass(frozen=True)
class FloatAttention:
    """Attention of one layer and group as a run of many tokens computes it, in `graph`, a branch."""

    graph: GraphBuilder
    config: ExPEConfig
    name: str
    group: HeadGroup
    reading: Reading
    scales: Scales | None
    bias: Bias | None

    @property
    def shared(self) -> int:
        """How many query heads share a key/value head."""
        return self.config.num_attention_heads // self.config.num_key_value_heads

    @property
    def cuts(self) -> list[tuple[int, int]]:
        """Which key/value heads are floats at once: few where they see the whole text, whose floats take memory."""
        heads, step = self.group.heads, self.group.heads if self.group.window else FLOAT_HEADS
        return [(begin, min(begin + step, heads)) for begin in range(0, heads, step)]

    def emit(self, states: Sequence[str], past: Sequence[str], present: Sequence[str]) -> str:
        """Append it; return its result (B, T, H·D).

        Args:
            states: queries, keys and values, or, in front of two empty names, all of them side by side.
            past, present: the cache, and the names that it gets with what is new.
        """
        graph, name, cuts = self.graph, self.name, self.cuts
        query, *new = states if states[1] else split(graph, self.config, name, states[0])
        for part in zip(Scales._fields, new, past, present, strict=True):
            self._append(*part)
        query = self._scaled("key", query, f"{name}.query.scaled")
        widths = graph.ints(*((end - begin) * self.shared * self.config.head_dim for begin, end in cuts))
        queries = graph.multi("Split", [query, widths], len(cuts), name=f"{name}.queries", axis=-1)
        mixed = [self._attend(part, present, *cut) for part, cut in zip(queries, cuts, strict=True)]
        together = graph.op("Concat", *mixed, name=f"{name}.together", axis=-1) if len(mixed) > 1 else mixed[0]
        return self._scaled("value", together, f"{name}.scaled")

    def _scaled(self, part: str, tensor: str, name: str) -> str:
        """Multiply (B, T, H·D) by what a level of each head's keys or values is worth."""
        assert self.scales is not None
        graph, scale = self.graph, getattr(self.scales, part)
        if self.shared > 1:
            shape = graph.ints(1, self.group.heads, self.shared, self.config.head_dim)
            scale = graph.op("Expand", scale, shape, name=f"{self.name}.scales")
        scale = graph.op("Reshape", scale, graph.ints(1, 1, -1), name=f"{self.name}.scales")
        return graph.op("Mul", tensor, graph.narrow(scale, f"{self.name}.scales"), name=name)

    def _append(self, part: str, new: str, past: str, present: str) -> None:
        """Write new keys or values (B, T, heads·D) to the cache."""
        graph, name = self.graph, f"{self.name}.{part}"
        headed = graph.op("Reshape", new, graph.ints(0, 0, -1, self.config.head_dim), name=f"{name}.split")
        headed = graph.op("Transpose", headed, name=f"{name}.heads", perm=[0, 2, 1, 3])
        if self.scales is not None:
            headed = self._rounded(name, headed, getattr(self.scales, part))
        graph.emit("ScatterND", [past, self.reading.places, headed], [present], name=f"{name}.present")

    def _rounded(self, name: str, headed: str, scale: str) -> str:
        """Round new keys or values (B, heads, T, D) as the operator does."""
        graph, headed = self.graph, self.graph.widen(headed, name)
        levels = graph.op("Mul", headed, graph.op("Reciprocal", scale, name=f"{name}.inverse"), name=f"{name}.levels")
        step, zero = graph.scalar(1.0), graph.scalar(0, np.int8)
        return graph.op("QuantizeLinear", levels, step, zero, name=f"{name}.rounded")

    def _restore(self, part: str, present: str, begin: int, end: int) -> str:
        """What heads hold as floats, still in levels, (B, heads, S, D)."""
        graph, name = self.graph, f"{self.name}.{part}"
        ends = graph.op("Concat", graph.ints(end), self.reading.total, name=f"{name}.ends", axis=0)
        held = graph.op("Slice", present, graph.ints(begin, 0), ends, graph.ints(1, 2), name=f"{name}.held")
        return graph.op("Cast", held, name=f"{name}.floats", to=int(TensorProto.FLOAT))

    def _attend(self, query: str, present: Sequence[str], begin: int, end: int) -> str:
        """Attention of queries (B, T, H·D) over the key/value heads [begin, end); rows of one are all that share it."""
        graph, name, heads, shared, size = self.graph, self.name, end - begin, self.shared, self.config.head_dim
        held = [self._restore(part, each, begin, end) for part, each in zip(Scales._fields, present, strict=True)]
        scores = self.bias(graph, begin * shared, end * shared) if self.bias else ""
        if shared > 1:
            query = graph.op("Reshape", query, graph.ints(0, 0, heads, shared, size), name=f"{name}.query.heads")
            query = graph.op("Transpose", query, name=f"{name}.query.grouped", perm=[0, 3, 1, 2, 4])
            query = graph.op("Reshape", query, graph.ints(0, -1, heads * size), name=f"{name}.query.rows")
            scores = scores and graph.op("Reshape", scores, graph.ints(0, heads, -1, 0), name=f"{name}.bias.rows")
        inputs = [query, *held, "", "", self._masked(scores)]
        mixed = graph.op("MultiHeadAttention", *inputs, name=f"{name}.mixed", domain=MICROSOFT, num_heads=heads)
        if shared > 1:
            mixed = graph.op("Reshape", mixed, graph.ints(0, shared, -1, heads, size), name=f"{name}.rows")
            mixed = graph.op("Transpose", mixed, name=f"{name}.tokens", perm=[0, 2, 3, 1, 4])
            mixed = graph.op("Reshape", mixed, graph.ints(0, 0, -1), name=f"{name}.joined")
        return mixed

    def _masked(self, scores: str) -> str:
        """What is added to scores, (B, heads, H/Hkv·T, S), of that and of what is hidden; the name may be empty."""
        hidden = self.reading.hidden
        return self.graph.op("Add", scores, hidden, name=f"{self.name}.masked") if scores else hidden
