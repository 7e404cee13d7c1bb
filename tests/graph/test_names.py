"""Tensors called after the nodes that make them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from expe_edge.graph.build import build_graph, graph_contract
from expe_edge.graph.linears import DynamicInt8, Float32, LinearFormat
from expe_edge.graph.names import name_tensors
from expe_edge.graph.nodes import every_node
from expe_edge.quant.channels import CacheScales
from tests.conftest import needs_int8_cache
from tests.graphs import CONFIG, random_weights, run_text, token_stream


@pytest.mark.parametrize("kind", ["ordinary", "portable", pytest.param("int8 cache", marks=needs_int8_cache)])
@pytest.mark.parametrize("linear", [Float32(), DynamicInt8()], ids=lambda kind: type(kind).__name__)
def test_the_graph_computes_the_same_and_no_tensor_is_a_number(linear: LinearFormat[Any], kind: str) -> None:
    portable, int8_cache = kind == "portable", kind == "int8 cache"
    scales = [CacheScales(*(np.full((2, CONFIG.head_dim), 0.03, dtype=np.float32) for _ in range(2)))] * 2
    model = build_graph(random_weights(), linear, portable=portable, cache=scales if int8_cache else None).model
    named = onnx.ModelProto()
    named.CopyFrom(model)
    name_tensors(named)
    onnx.checker.check_model(named)  # every tensor is made once, before it is read
    made = [name for node in every_node(named.graph) for name in node.output if name]
    assert len(set(made)) == len(made)
    assert {"layers.0.attention.qkv", "layers.1.feed_forward.active", "logits"} <= set(made)
    assert not any(name[0] == "t" and name[1:].isdigit() for name in made)
    contract, tokens = graph_contract(CONFIG, portable=portable, int8_cache=int8_cache), token_stream(40)
    before, after = (run_text(each, contract, tokens)[0] for each in (model, named))
    np.testing.assert_array_equal(after, before)
