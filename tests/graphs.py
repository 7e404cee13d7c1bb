"""Running nodes, one linear, or a small random model in onnxruntime; and looking into what runs."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from expe_edge.export.fold import extract_weights
from expe_edge.export.kernels import optimized_operators
from expe_edge.graph.build import BuiltGraph, build_graph, graph_contract
from expe_edge.graph.linears import Float32, FormatOptions, LinearFormat, StaticInt8
from expe_edge.graph.nodes import GraphBuilder
from expe_edge.graph.run import graph_feeds
from expe_edge.graph.weights import ModelWeights
from expe_edge.model.config import ExPEConfig
from expe_edge.package.contract import GraphContract, TensorSpec
from expe_edge.quant.channels import Range
from tests.strategies import random_model, random_tokens, small_config

#: A model with random weights, for tests that need just one.
CONFIG = small_config()
LINEARS = {
    *(
        f"layers.{layer}.{part}"
        for layer in range(2)
        for part in ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")
    ),
    "head",
}


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normal float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def open_session(model: onnx.ModelProto) -> ort.InferenceSession:
    """A session of one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_nodes(emit: Callable[[GraphBuilder], str], shape: tuple[int, ...], **inputs: np.ndarray) -> np.ndarray:
    """Run the nodes that `emit` appends and return the float32 tensor whose name it returns.

    Args:
        shape: of the result. inputs: the graph's inputs by name.
    """
    builder = GraphBuilder()
    builder.emit("Identity", [emit(builder)], ["result"], name="result")
    specs = [TensorSpec(name, str(value.dtype), value.shape) for name, value in inputs.items()]
    model = builder.model(specs, [TensorSpec("result", "float32", shape)], "test")
    result: np.ndarray = open_session(model).run(None, inputs)[0]
    return result


def run_linear(
    linear: LinearFormat[Any], hidden: np.ndarray, weight: np.ndarray, *, peaked: bool = False
) -> np.ndarray:
    """The product of (T, C_in) with (C_in, C_out) in one format."""

    def emit(builder: GraphBuilder) -> str:
        return linear.emit(builder, "linear", "hidden", linear.store("linear", weight), peaked=peaked)

    return run_nodes(emit, (len(hidden), weight.shape[1]), hidden=hidden)


def static(bounds: Range, *, reduce_range: bool = False) -> StaticInt8:
    """int8-static of one linear."""
    return StaticInt8(FormatOptions(reduce_range, ranges={"linear": bounds}))


def random_weights(config: ExPEConfig = CONFIG, *, folded: bool = True) -> ModelWeights:
    """The weights of `random_model`."""
    return extract_weights(random_model(config), folded=folded)


def arrays_of(value: Any) -> list[np.ndarray]:
    """Every array in a tree of dataclasses, in order."""
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, tuple):
        return [array for part in value for array in arrays_of(part)]
    if dataclasses.is_dataclass(value):
        return [array for field in dataclasses.fields(value) for array in arrays_of(getattr(value, field.name))]
    return []


@functools.cache
def plain_graph() -> BuiltGraph:
    """The float32 graph of `CONFIG`."""
    return build_graph(random_weights(), Float32())


def token_stream(tokens: int, config: ExPEConfig = CONFIG) -> np.ndarray:
    """Random text, (tokens,) int32."""
    ids: np.ndarray = random_tokens(config, tokens, seed=1)[0]
    return ids.astype(np.int32)


def run_text(
    model: onnx.ModelProto, contract: GraphContract, tokens: np.ndarray, parts: Sequence[int] = ()
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits (T, V) of `tokens` (T,), and the cache after them; in consecutive `parts`, by default in one."""
    session, cache, logits = open_session(model), None, []
    for part in np.split(tokens.astype(np.int64), np.cumsum(parts or [len(tokens)])[:-1]):
        outputs: list[np.ndarray] = session.run(None, graph_feeds(contract, part[None], cache))
        logits.append(outputs[0][0])
        cache = outputs[1:]
    assert cache is not None
    return np.concatenate(logits), cache


def operators_of(model: onnx.ModelProto) -> Counter[str]:
    """How often each operator occurs in what onnxruntime makes of the graph."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.onnx")
        onnx.save(model, path)
        return optimized_operators(path)


def watched(model: onnx.ModelProto, names: Sequence[str]) -> ort.InferenceSession:
    """A session whose outputs are also the float32 tensors `names`."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    return open_session(copy)


def rows_of(
    model: onnx.ModelProto, tensors: Mapping[str, str], windows: Sequence[np.ndarray], config: ExPEConfig = CONFIG
) -> dict[str, np.ndarray]:
    """Every row (tokens, C) that tensors have over prefills of the windows. tensors: any key to the tensor's name."""
    names, contract = sorted(set(tensors.values())), graph_contract(config)
    session = watched(model, names)
    runs: list[list[Any]] = [session.run(names, graph_feeds(contract, window[None])) for window in windows]
    values = {name: np.concatenate([run[index][0] for run in runs]) for index, name in enumerate(names)}
    return {key: values[name] for key, name in tensors.items()}


def inputs_of(graph: BuiltGraph, windows: Sequence[np.ndarray], config: ExPEConfig = CONFIG) -> dict[str, np.ndarray]:
    """Every row that enters each linear of a graph over prefills of the windows."""
    return rows_of(graph.model, {name: linear.input for name, linear in graph.linears.items()}, windows, config)
