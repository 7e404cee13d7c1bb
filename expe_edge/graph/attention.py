"""Attention and the cache as nodes: one contributed operator, or standard ones alone.

com.microsoft::GroupQueryAttention, https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
The standard Attention of opset 23 is too new for most of the engines that the portable graph is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto

from expe_edge.graph.encoding import Bias, Projection, split
from expe_edge.graph.floats import HIDDEN, FloatAttention, FloatReading, Scales
from expe_edge.graph.nodes import MICROSOFT, GraphBuilder
from expe_edge.graph.padding import TokensFirst
from expe_edge.graph.windows import Keys
from expe_edge.model.config import ExPEConfig
from expe_edge.package.contract import GraphContract, HeadGroup
from expe_edge.quant.channels import CacheScales

#: The oldest onnxruntime whose attention takes the bias of positions, and one in a window, and an int8 cache. Before,
#: GroupQueryAttention with a window and a bias computes something else.
SINCE_BIAS, SINCE_WINDOWS, SINCE_INT8_CACHE = "1.22", "1.24", "1.27"


@dataclass
class GroupedAttention:
    """Attention through GroupQueryAttention, which appends to the cache in place where past and present are one.

    One operator for every group of heads of `contract`. keys: of each group.
    cache: scales of every layer where it is int8, PER_CHANNEL. Runs of many tokens then read it as floats.
    """

    graph: GraphBuilder
    config: ExPEConfig
    contract: GraphContract
    keys: Sequence[Keys]
    run: TokensFirst
    cache: Sequence[CacheScales] | None = None

    def __post_init__(self) -> None:
        self.operands = [keys.operands(self.graph) for keys in self.keys]
        self.floats = FloatReading(self.graph, self.config, self.contract, self.keys, self.run) if self.cache else None

    def emit(self, name: str, layer: int, projection: Projection) -> str:
        """Append the attention of one layer; return (B, T, H·D)."""
        groups = self.contract.groups
        if len(groups) == 1:
            queries = [projection.query, projection.key, projection.value]
            return self.attend(name, layer, groups[0], queries, *projection.biases)
        parts = self._parts(name, projection.query)
        mixed = [
            self.attend(f"{name}.{index}", layer, group, parts[index :: len(groups)], bias)
            for index, (group, bias) in enumerate(zip(groups, projection.biases, strict=True))
        ]
        return self.graph.op("Concat", *mixed, name=name, axis=-1)

    def _parts(self, name: str, fused: str) -> list[str]:
        """Split (B, T, (H + 2·Hkv)·D) into the queries of every group, then their keys, then their values."""
        size, shared = self.config.head_dim, self.config.num_attention_heads // self.config.num_key_value_heads
        keys = [group.heads * size for group in self.contract.groups]
        sizes = self.graph.ints(*(shared * width for width in keys), *keys, *keys)
        return self.graph.multi("Split", [fused, sizes], 3 * len(keys), name=f"{name}.groups", axis=-1)

    def cache_of(self, layer: int, index: int) -> tuple[Sequence[str], Sequence[str]]:
        """Return the names of the keys and values of a group, in the past and in the present."""
        begin = 2 * (layer * len(self.contract.groups) + index)
        past, present = self.contract.past_names, self.contract.present_names
        return past[begin : begin + 2], present[begin : begin + 2]

    def attend(self, name: str, layer: int, group: HeadGroup, states: Sequence[str], bias: Bias | None) -> str:
        """Append the attention of one group of heads."""
        graph, index = self.graph, self.contract.groups.index(group)
        past, present = self.cache_of(layer, index)
        outputs = [graph.tensor(), *present]
        if self.cache is None or self.floats is None:
            self._operator(graph, name, index, [*states, *past], bias, outputs)
            return outputs[0]
        scales = self.scales(name, self.cache[layer], group)
        few, many = graph.branch(), graph.branch()
        few_results = [graph.tensor() for _ in outputs]
        self._operator(few, name, index, [*states, *past], bias, few_results, scales)
        reading = self.floats.readings[index]
        attention = FloatAttention(many, self.config, name, group, reading, scales, bias)
        cache = [graph.tensor() for _ in past]
        many_results = [attention.emit(states, past, cache), *cache]
        for branch, results in ((few, few_results), (many, many_results)):
            for tensor, dtype in zip(results, ("float32", "int8", "int8"), strict=True):
                branch.result(tensor, dtype)
        graph.choose(self.floats.many, many, few, outputs, name=f"{name}.read")
        return outputs[0]

    def _operator(
        self,
        graph: GraphBuilder,
        name: str,
        index: int,
        tensors: Sequence[str],
        bias: Bias | None,
        outputs: Sequence[str],
        scales: Scales | None = None,
    ) -> None:
        """Append GroupQueryAttention of one group; tensors: what is projected, then its cache."""
        group = self.contract.groups[index]
        heads = group.heads * self.config.num_attention_heads // self.config.num_key_value_heads
        inputs = [*tensors, *self.operands[index]]
        attributes: dict[str, Any] = {"local_window_size": group.window} if group.window else {}
        if bias or scales:
            inputs += ["", "", "", bias(graph, 0, heads) if bias else ""]
        if scales:
            inputs += [graph.constant(np.full(heads, HIDDEN, dtype=np.float32)), *scales]
            attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        graph.emit(
            "GroupQueryAttention",
            inputs,
            outputs,
            name=name,
            domain=MICROSOFT,
            num_heads=heads,
            kv_num_heads=group.heads,
            do_rotary=0,
            **attributes,
        )

    def scales(self, name: str, scales: CacheScales, group: HeadGroup) -> Scales:
        """Store what a level is worth in the keys and values of a group."""
        parts = {
            part: np.ascontiguousarray(scale[None, group.begin : group.end, None, :])
            for part, scale in scales._asdict().items()
        }
        return Scales(*(self.graph.weight(f"{name}.{part}.scale", scale) for part, scale in parts.items()))


@dataclass
class PortableAttention:
    """Attention in standard operators, over a cache that grows: present is past with all new keys appended.

    A query sees the keys that are tokens, by the mask, and stand no later than itself. Padding is appended like any
    key and hidden from then on, so it may stand before, between or after a row's tokens: rows of several lengths can
    be prefilled together and decoded on.

    key_positions: appends the keys' positions, (B, 1, 1, S) int64.
    """

    graph: GraphBuilder
    config: ExPEConfig
    key_positions: Callable[[], str]

    def __post_init__(self) -> None:
        """What is added to the score of every query and key, (B, 1, T, S): 0 where the query sees the key."""
        graph = self.graph
        queries = graph.op("Unsqueeze", "position_ids", graph.ints(1, 3), name="visible.queries")
        past = graph.op("LessOrEqual", self.key_positions(), queries, name="visible.past")
        tokens = graph.op("Cast", "attention_mask", name="visible.tokens", to=int(TensorProto.BOOL))
        tokens = graph.op("Unsqueeze", tokens, graph.ints(1, 2), name="visible.tokens")
        visible = graph.op("And", past, tokens, name="visible")
        mask = graph.op("Where", visible, graph.scalar(0.0), graph.scalar(HIDDEN), name="visible.mask")
        self.masks = {"": mask}

    def emit(self, name: str, layer: int, projection: Projection) -> str:
        """Append the attention of one layer; return (B, T, H·D)."""
        graph, config = self.graph, self.config
        shared, size = config.num_key_value_heads, config.head_dim
        parts = [projection.query, projection.key, projection.value]
        query, key, value = parts if projection.key else split(graph, config, name, projection.query)
        query = self._heads(f"{name}.query", query, config.num_attention_heads)
        key = self._append(f"{name}.key", f"{layer}.key", key)
        value = self._append(f"{name}.value", f"{layer}.value", value)
        scaled = graph.op("Mul", self._grouped(query, shared), graph.scalar(1 / math.sqrt(size)), name=f"{name}.scaled")
        turned = graph.op("Transpose", key, name=f"{name}.turned", perm=[0, 1, 3, 2])
        scores = graph.op("MatMul", scaled, turned, name=f"{name}.scores")
        scores = self._grouped(scores, config.num_attention_heads)
        scores = graph.op("Add", scores, self._masked(name, *projection.biases), name=f"{name}.masked")
        weights = graph.op("Softmax", scores, name=f"{name}.weights", axis=-1)
        mixed = graph.op("MatMul", self._grouped(weights, shared), value, name=f"{name}.mixed")
        mixed = self._grouped(mixed, config.num_attention_heads)
        mixed = graph.op("Transpose", mixed, name=f"{name}.tokens", perm=[0, 2, 1, 3])
        return graph.op("Reshape", mixed, graph.ints(0, 0, -1), name=name)

    def _masked(self, name: str, bias: Bias | None) -> str:
        """The mask with `bias` added, once for all layers that share it."""
        added = bias(self.graph, 0, self.config.num_attention_heads) if bias else ""
        if added not in self.masks:
            self.masks[added] = self.graph.op("Add", added, self.masks[""], name=f"{name}.bias")
        return self.masks[added]

    def _heads(self, name: str, states: str, heads: int) -> str:
        """(B, T, heads·D) to (B, heads, T, D)."""
        split = self.graph.op("Reshape", states, self.graph.ints(0, 0, heads, -1), name=f"{name}.split")
        return self.graph.op("Transpose", split, name=f"{name}.heads", perm=[0, 2, 1, 3])

    def _append(self, name: str, part: str, states: str) -> str:
        """Append new keys or values (B, T, Hkv·D) to the cache; return all, (B, Hkv, S, D)."""
        present, new = f"present.{part}", self._heads(name, states, self.config.num_key_value_heads)
        self.graph.emit("Concat", [f"past_key_values.{part}", new], [present], name=f"{name}.appended", axis=2)
        return present

    def _grouped(self, states: str, heads: int) -> str:
        """(B, H, T, …) as (B, Hkv, H/Hkv·T, …) or back: queries of one key/value head are rows of one product."""
        if self.config.num_attention_heads == self.config.num_key_value_heads:
            return states
        return self.graph.op("Reshape", states, self.graph.ints(0, heads, -1, 0), name="attention.grouped")
