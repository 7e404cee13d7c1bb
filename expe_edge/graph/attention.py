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

from expe_edge.graph.encoding import Projection, split
from expe_edge.graph.nodes import MICROSOFT, GraphBuilder
from expe_edge.graph.padding import TokensFirst
from expe_edge.model.config import ExPEConfig
from expe_edge.quant.channels import CacheScales

#: What is added to the score of a key that a query does not see. Finite: a row of padding alone sees none.
HIDDEN = float(np.finfo(np.float32).min)
#: The oldest onnxruntime whose attention takes the bias of positions, and an int8 cache.
SINCE_BIAS, SINCE_INT8_CACHE = "1.22", "1.27"


@dataclass
class GroupedAttention:
    """Attention through GroupQueryAttention, which appends to the cache in place where past and present are one.

    run: the lengths of the rows, whose tokens stand first. cache: scales of every layer where it is int8, PER_CHANNEL.
    """

    graph: GraphBuilder
    config: ExPEConfig
    run: TokensFirst
    cache: Sequence[CacheScales] | None = None

    def emit(self, name: str, layer: int, projection: Projection) -> str:
        """Append the attention of one layer; return (B, T, H·D)."""
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        inputs = [projection.query, projection.key, projection.value, *past, self.run.last, self.run.total]
        attributes: dict[str, Any] = {}
        if projection.bias or self.cache is not None:
            inputs += ["", "", "", projection.bias]
        if self.cache is not None:
            inputs += ["", *self._scales(name, self.cache[layer])]
            attributes = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        self.graph.emit(
            "GroupQueryAttention",
            inputs,
            [name, f"present.{layer}.key", f"present.{layer}.value"],
            name=name,
            domain=MICROSOFT,
            num_heads=self.config.num_attention_heads,
            kv_num_heads=self.config.num_key_value_heads,
            do_rotary=0,
            **attributes,
        )
        return name

    def _scales(self, name: str, scales: CacheScales) -> list[str]:
        return [
            self.graph.weight(f"{name}.{part}.scale", np.ascontiguousarray(scale[None, :, None, :]))
            for part, scale in scales._asdict().items()
        ]


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
        scores = graph.op("Add", scores, self._masked(name, projection.bias), name=f"{name}.masked")
        weights = graph.op("Softmax", scores, name=f"{name}.weights", axis=-1)
        mixed = graph.op("MatMul", self._grouped(weights, shared), value, name=f"{name}.mixed")
        mixed = self._grouped(mixed, config.num_attention_heads)
        mixed = graph.op("Transpose", mixed, name=f"{name}.tokens", perm=[0, 2, 1, 3])
        return graph.op("Reshape", mixed, graph.ints(0, 0, -1), name=name)

    def _masked(self, name: str, bias: str) -> str:
        """The mask with `bias` added, once for all layers that share it."""
        if bias not in self.masks:
            self.masks[bias] = self.graph.op("Add", bias, self.masks[""], name=f"{name}.bias")
        return self.masks[bias]

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
