"""Graphs of a single GroupQueryAttention, as onnxruntime documents the operator, and what they compute in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from tests.alone import open_alone

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

#: Outputs in order, and which input of the cache each of the last two takes the place of.
OUTPUTS = ("mixed", "keys", "values")
PAST = {"keys": "past_keys", "values": "past_values"}


@dataclass(frozen=True)
class Attention:
    """Attention of `heads` over `key_heads` of so many dimensions each.

    window: tokens that a query sees, 0 for all. bias: its rows and heads, or None. dtype: of the cache. by_channel:
    whether a cache of int8 has scales for each channel. packed: whether queries, keys and values are one tensor.
    extra: attributes beside those.
    """

    heads: int
    key_heads: int
    size: int
    window: int = 0
    bias: tuple[str, str] | None = None
    sink: bool = False
    dtype: str = "float32"
    by_channel: bool = True
    packed: bool = False
    extra: tuple[tuple[str, Any], ...] = ()

    def session(self, threads: int = 1, library: Path | None = None) -> ort.InferenceSession:
        """Open it, with a library of kernels or onnxruntime's own."""
        return open_alone(self.model(), threads, library)

    @property
    def scales(self) -> list[Array]:
        """What a level of the cache is worth in keys and in values; 1 of floats."""
        random, shape = np.random.default_rng(1), (1, self.key_heads, 1, self.size) if self.by_channel else (1,)
        if self.dtype == "float32":
            return [np.ones(shape, dtype=np.float32)] * 2
        return [(0.01 + 0.02 * random.random(shape)).astype(np.float32) for _ in range(2)]

    @property
    def sinks(self) -> Array:
        return np.random.default_rng(2).standard_normal(self.heads).astype(np.float32)

    def model(self) -> onnx.ModelProto:
        quantized = self.dtype == "int8"
        constants = dict(zip(("key_scales", "value_scales"), self.scales, strict=True)) if quantized else {}
        if self.sink:
            constants["sink"] = self.sinks
        states = ["query", "", ""] if self.packed else ["query", "key", "value"]
        optional = [
            "bias" if self.bias else "",
            *(n if n in constants else "" for n in ("sink", "key_scales", "value_scales")),
        ]
        inputs = [*states, "past_keys", "past_values", "last", "total", "", "", "", *optional]
        attributes: dict[str, Any] = dict(self.extra)
        if self.window:
            attributes["local_window_size"] = self.window
        if quantized:
            kind = "PER_CHANNEL" if self.by_channel else "PER_TENSOR"
            attributes |= {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": 8}
        while inputs[-1] == "":
            inputs.pop()
        node = helper.make_node(
            "GroupQueryAttention",
            inputs,
            OUTPUTS,
            domain="com.microsoft",
            num_heads=self.heads,
            kv_num_heads=self.key_heads,
            **attributes,
        )
        cache = TensorProto.INT8 if quantized else TensorProto.FLOAT
        types = dict.fromkeys(("query", "key", "value", "bias"), TensorProto.FLOAT)
        types |= {"past_keys": cache, "past_values": cache, "last": TensorProto.INT32, "total": TensorProto.INT32}
        axes = {"last": 1, "total": 1, "query": 3, "key": 3, "value": 3}
        graph = helper.make_graph(
            [node],
            "attention",
            [helper.make_tensor_value_info(n, types[n], [None] * axes.get(n, 4)) for n in inputs if n in types],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT if n == "mixed" else cache, None) for n in OUTPUTS],
            [numpy_helper.from_array(tensor, name) for name, tensor in constants.items()],
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)

    def feeds(
        self, tokens: int, past: Sequence[int], capacity: int | None = None, *, total: int | None = None
    ) -> Feeds:
        """Random inputs: so many tokens for each row behind so many others.

        capacity: of the cache, `max(past)` unless told. total: of the longest row.
        """
        random, batch = np.random.default_rng(tokens), len(past)
        widths = [self.heads * self.size, *[self.key_heads * self.size] * 2]
        total = max(past) + tokens if total is None else total
        states = [random.standard_normal((batch, tokens, width)).astype(np.float32) for width in widths]
        shape = (batch, self.key_heads, max(past) if capacity is None else capacity, self.size)
        feeds: Feeds = (
            {"query": np.concatenate(states, -1)}
            if self.packed
            else dict(zip(("query", "key", "value"), states, strict=True))
        )
        for name in PAST.values():
            drawn = random.standard_normal(shape)
            feeds[name] = (
                (drawn * 40).clip(-128, 127).round().astype(np.int8)
                if self.dtype == "int8"
                else drawn.astype(np.float32)
            )
        feeds["last"] = np.array(past, dtype=np.int32) + (tokens - 1)
        feeds["total"] = np.array([total], dtype=np.int32)
        if self.bias:
            rows, heads = (batch if self.bias[0] == "rows" else 1), (self.heads if self.bias[1] == "heads" else 1)
            feeds["bias"] = random.standard_normal((rows, heads, tokens, total)).astype(np.float32)
        return feeds

    def states(self, feeds: Feeds) -> list[Array]:
        """Queries, keys and values, (B, heads, T, D)."""
        if self.packed:
            ends = np.cumsum([self.heads * self.size, self.key_heads * self.size])
            parts = np.split(feeds["query"], ends, axis=-1)
        else:
            parts = [feeds[name] for name in ("query", "key", "value")]
        return [part.reshape(*part.shape[:2], -1, self.size).transpose(0, 2, 1, 3) for part in parts]

    def present(self, feeds: Feeds) -> list[Array]:
        """The cache with what is new, and zeros behind each row where it has none."""
        _, *new = self.states(feeds)
        tokens, cache = new[0].shape[2], []
        for part, past, scale in zip(new, PAST.values(), self.scales, strict=True):
            if self.dtype == "int8":
                part = np.rint(part * (np.float32(1) / scale)).clip(-128, 127).astype(np.int8)
            whole = np.zeros(
                (*feeds[past].shape[:2], max(feeds[past].shape[2], int(feeds["total"][0])), self.size), part.dtype
            )
            whole[:, :, : feeds[past].shape[2]] = feeds[past]
            for row, last in enumerate(feeds["last"]):
                whole[row, :, last + 1 - tokens : last + 1] = part[row]
            cache.append(whole)
        return cache

    def reference(self, feeds: Feeds) -> Array:
        """The result in float64, (B, T, H·D), of rows whose tokens stand behind their past."""
        query = self.states(feeds)[0].astype(np.float64)
        shared, tokens, total = self.heads // self.key_heads, query.shape[2], int(feeds["total"][0])
        keys, values = (
            np.repeat(part[:, :, :total].astype(np.float64) * scale, shared, axis=1)
            for part, scale in zip(self.present(feeds), self.scales, strict=True)
        )
        scores = query @ keys.transpose(0, 1, 3, 2) / np.sqrt(self.size) + feeds.get("bias", np.zeros(1))
        own = feeds["last"][:, None] + 1 - tokens + np.arange(tokens)  # (B, T): each token's own key
        distance = own[:, None, :, None] - np.arange(total)
        seen = (distance >= 0) & (distance < self.window if self.window else True)
        scores = np.where(seen, scores, -np.inf)
        sinks = self.sinks[None, :, None, None] if self.sink else np.full((1, 1, 1, 1), -np.inf)
        peak = np.maximum(scores.max(-1, keepdims=True), sinks)
        weights = np.exp(scores - peak)
        mixed = weights @ values / (weights.sum(-1, keepdims=True) + np.exp(sinks - peak))
        together: Array = mixed.transpose(0, 2, 1, 3).reshape(mixed.shape[0], tokens, -1)
        return together


class Bound:
    """A run whose present is written to where past is, which has room for it."""

    def __init__(self, session: ort.InferenceSession, feeds: Feeds) -> None:
        self.session, self.binding = session, session.io_binding()
        self.arrays = {name: each.copy() for name, each in feeds.items()}
        self.held = {name: ort.OrtValue.ortvalue_from_numpy(each) for name, each in self.arrays.items()}
        for name, value in self.held.items():
            self.binding.bind_ortvalue_input(name, value)
        self.binding.bind_output("mixed")
        for name, past in PAST.items():
            self.binding.bind_ortvalue_output(name, self.held[past])

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def outputs(self) -> list[Array]:
        return [self.binding.get_outputs()[0].numpy().copy(), *(self.arrays[past] for past in PAST.values())]


def run(session: ort.InferenceSession, feeds: Feeds, *, shared: bool = False) -> list[Array]:
    """Return the outputs. shared: whether past and present are one buffer, with room for what is new."""
    if not shared:
        return session.run(None, feeds)  # type: ignore[no-any-return]
    call = Bound(session, feeds)
    call()
    return call.outputs()
