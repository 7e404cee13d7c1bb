"""Attention over the whole buffer, as graphs for GPUs have it: against the graph for CPUs, and what it is safe from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expe_edge.divergence import divergence
from expe_edge.errors import ExportError
from expe_edge.graph.build import build_graph, graph_contract
from expe_edge.graph.linears import Float16, Float32, Int4Weight, Int8Weight
from expe_edge.graph.nodes import every_node
from expe_edge.graph.run import graph_feeds
from expe_edge.graph.weights import ModelWeights
from expe_edge.package.contract import GraphContract
from expe_edge.quant.channels import CacheScales
from tests.conftest import needs_int8_cache, needs_windows
from tests.graphs import open_session, random_weights
from tests.strategies import random_tokens, small_config

RECIPE = {"slopes": "alibi", "softplus": True, "content_heads": 1, "temperature": 0.36}
CONFIG = small_config(training_length=16, num_key_value_heads=2, positional_parameters=RECIPE, output_gate=True)
LENGTH = 60
TOKENS = random_tokens(CONFIG, LENGTH)
SIZE = (CONFIG.num_key_value_heads, CONFIG.head_dim)
SCALES = [CacheScales(*(np.full(SIZE, 0.05, dtype=np.float32) for _ in range(2)))] * CONFIG.num_hidden_layers
OPTIONS: dict[str, dict[str, Any]] = {"": {}, "windows": {"windows": (12, 0)}, "int8 cache": {"int8_cache": True}}
every_kind = pytest.mark.parametrize(
    "kind",
    ["", pytest.param("windows", marks=needs_windows), pytest.param("int8 cache", marks=needs_int8_cache)],
    ids=lambda kind: kind or "plain",
)


@functools.cache
def weights() -> ModelWeights:
    return random_weights(CONFIG)


@functools.cache
def made(kind: str, gpu: str | None) -> tuple[ort.InferenceSession, GraphContract]:
    options = OPTIONS[kind]
    cache = SCALES if options.get("int8_cache") else None
    linears = Float16() if gpu == "float16" else Float32()
    graph = build_graph(weights(), linears, cache=cache, windows=options.get("windows", ()), gpu=gpu)
    return open_session(graph.model), graph_contract(CONFIG, **options, gpu=gpu)


def run(
    session: ort.InferenceSession,
    contract: GraphContract,
    parts: Sequence[int],
    spare: int = 0,
    filling: float = 0.0,
) -> np.ndarray:
    """Logits (T, V) of `TOKENS` in consecutive parts, over buffers with `spare` columns more than are needed.

    filling: what stands in columns that hold nothing yet.
    """
    held: list[np.ndarray] | None = None
    logits: list[np.ndarray] = []
    for part in np.split(TOKENS, np.cumsum(parts)[:-1], axis=1):
        feeds = graph_feeds(contract, part, held)
        before = sum(len(one) for one in logits)
        for name, group in zip(contract.past_names, contract.cache_groups, strict=True):
            kept = min(before, group.window - 1) if group.window else before
            past = feeds[name][:, :, :kept]
            room = np.full((*past.shape[:2], part.shape[1] + spare, past.shape[3]), filling, dtype=past.dtype)
            feeds[name] = np.concatenate([past, room], axis=2)
        one, *cache = session.run(None, feeds)
        logits.append(one[0])
        held = [
            array[:, :, : (min(before, group.window - 1) if group.window else before) + part.shape[1]]
            for array, group in zip(cache, contract.cache_groups, strict=True)
        ]
    return np.concatenate(logits)


@every_kind
@given(cuts=st.lists(st.integers(1, LENGTH - 1), unique=True, max_size=8), spare=st.integers(0, 9))
def test_it_computes_what_the_graph_for_cpus_does(kind: str, cuts: list[int], spare: int) -> None:
    parts = np.diff([0, *sorted(cuts), LENGTH]).tolist()
    expected = run(*made(kind, None), [LENGTH])
    np.testing.assert_allclose(run(*made(kind, "float32"), parts, spare), expected, rtol=0, atol=2e-4)


@every_kind
@pytest.mark.parametrize("gpu", ["float32", "float16"])
def test_columns_that_hold_nothing_yet_are_not_seen(kind: str, gpu: str) -> None:
    parts = [40, 7, *[1] * 13]
    clean, filled = (run(*made(kind, gpu), parts, 5, filling) for filling in (0.0, 100.0))
    np.testing.assert_array_equal(filled, clean)


@every_kind
def test_half_precision_is_close_at_every_position(kind: str) -> None:
    expected = run(*made(kind, "float32"), [LENGTH])
    distance = divergence(expected, run(*made(kind, "float16"), [LENGTH]))
    assert 1e-9 < distance.mean() < 1e-3
    assert distance[-16:].mean() < 5 * distance[:16].mean() + 1e-6


def test_slopes_so_steep_that_half_precision_has_no_number_for_the_bias() -> None:
    """Far keys get what is least, and never an infinite score; so does what is hidden, whatever is added to it."""
    steep = dataclasses.replace(
        weights(),
        layers=tuple(
            dataclasses.replace(
                layer, positions=dataclasses.replace(layer.positions, slope_start=layer.positions.slope_start + 1e6)
            )
            for layer in weights().layers
            if layer.positions is not None
        ),
    )
    contract = {gpu: graph_contract(CONFIG, gpu=gpu) for gpu in ("float32", "float16")}
    found = {
        gpu: run(open_session(build_graph(steep, Float32(), gpu=gpu).model), contract[gpu], [LENGTH], 20)
        for gpu in contract
    }
    assert np.isfinite(found["float16"]).all()
    assert divergence(found["float32"], found["float16"]).mean() < 1e-3


@pytest.mark.parametrize("linears", [Float16(), Int8Weight(), Int4Weight()], ids=lambda linears: linears.name)
def test_half_precision_stores_and_computes_in_float16_all_but_positions(linears: Any) -> None:
    model = build_graph(weights(), linears, gpu="float16").model
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    wide = {name for name, kind in stored.items() if kind == onnx.TensorProto.FLOAT}
    constants = {name for name in wide if name.startswith("c") and name[1:].isdigit()}
    # The embedding, which is asked for apart, and the norm behind it, computed wide as its squares may be large.
    first = {"embedding.weight", "layers.0.attention.norm.gain"}
    assert {name for name in wide - constants - first if ".slope." not in name and ".gate." not in name} == set()
    casts = [node for node in every_node(model.graph) if node.op_type == "Cast"]
    assert len(casts) < 8 * CONFIG.num_hidden_layers + 22


@pytest.mark.parametrize("where", ["query_key", "query_key_value", "embedding"])
def test_positions_that_half_precision_would_round_are_refused(where: str) -> None:
    config = small_config(positional_parameters={"where": where})
    with pytest.raises(ExportError, match=r"half precision would round the positions .*; use `precision` float32$"):
        build_graph(random_weights(config), Float32(), gpu="float16")


def test_heads_of_any_size() -> None:
    config = small_config(hidden_size=40, num_attention_heads=8, num_key_value_heads=8)  # 5 numbers a head
    graph = build_graph(random_weights(config), Float32(), gpu="float32").model
    tokens = random_tokens(config, 20)
    portable = build_graph(random_weights(config), Float32(), portable=True).model
    found, expected = (
        open_session(model).run(["logits"], graph_feeds(contract, tokens))[0]
        for model, contract in (
            (graph, graph_contract(config, gpu="float32")),
            (portable, graph_contract(config, portable=True)),
        )
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
