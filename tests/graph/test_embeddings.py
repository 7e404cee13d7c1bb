"""Embeddings: the bytes they are stored in, the rows looked up, and heads that share them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from expe_edge.graph.build import HEAD, build_graph, graph_contract
from expe_edge.graph.linears import LINEAR_FORMATS, FormatOptions, make_format
from expe_edge.graph.matrices import EMBEDDING_FORMATS, StoredMatrix
from expe_edge.graph.nodes import GraphBuilder
from expe_edge.quant.solvers import WeightQuantizer
from tests.graphs import LINEARS, normal, random_weights, run_nodes, run_text, token_stream
from tests.strategies import seeds, small_config

every_format = pytest.mark.parametrize("name", EMBEDDING_FORMATS)


def stored(table: StoredMatrix) -> dict[str, TensorProto]:
    """What a lookup stores under names of its own."""
    builder = GraphBuilder()
    table.lookup(builder, "ids")
    return {tensor.name: tensor for tensor in builder.graph.initializer if tensor.name.startswith("embedding.")}


def arrays(table: StoredMatrix) -> dict[str, list[Any]]:
    """The same as plain lists."""
    return {name: numpy_helper.to_array(tensor).tolist() for name, tensor in stored(table).items()}


# Bytes.


def test_float32_is_stored_as_it_is() -> None:
    matrix = normal(0, 5, 3)
    (tensor,) = stored(EMBEDDING_FORMATS["float32"](matrix, None)).values()
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), matrix)


@pytest.mark.parametrize(
    ("name", "element", "words"),
    [
        ("float16", TensorProto.FLOAT16, [0x3C00, 0x3C02, 0xC200]),
        ("bfloat16", TensorProto.BFLOAT16, [0x3F80, 0x3F80, 0xC040]),
    ],
)
def test_half_precision_by_hand(name: str, element: int, words: list[int]) -> None:
    """1 + 2^-11 and 1 + 3·2^-11 lie halfway between numbers of float16, and go to the even ones."""
    matrix = np.array([[1 + 2**-11, 1 + 3 * 2**-11, -3.0]], dtype=np.float32)
    (tensor,) = stored(EMBEDDING_FORMATS[name](matrix, None)).values()
    assert tensor.data_type == element
    assert np.frombuffer(tensor.raw_data, dtype=np.uint16).tolist() == words


def test_eight_bits_by_hand() -> None:
    """One scale for each token: 1/64 and 2."""
    matrix = np.array([[127 / 64, 0.5, -1 / 128], [-254.0, 2.0, 3.0]], dtype=np.float32)
    table = EMBEDDING_FORMATS["int8"](matrix, None)
    assert arrays(table) == {
        "embedding.weight": [[255, 160, 128], [1, 129, 130]],
        "embedding.scale": [1 / 64, 2.0],
    }
    assert table.restored().T.tolist() == [[127 / 64, 0.5, 0.0], [-254.0, 2.0, 4.0]]


def test_four_bits_by_hand() -> None:
    """A row of 17 is a block of 16 and one of 1, padded with zeros, code 8; the earlier code is the low half."""
    matrix = np.zeros((1, 17), dtype=np.float32)
    matrix[0, :4], matrix[0, 16] = [-8.0, 3.0, 1.0, -1.0], 2.0
    table = EMBEDDING_FORMATS["int4"](matrix, 16)
    assert arrays(table) == {
        "embedding.weight": [[[0xB0, 0x79, *[0x88] * 6], [0x80, *[0x88] * 7]]],
        "embedding.scale": [[1.0, -0.25]],
    }
    np.testing.assert_array_equal(table.restored().T, matrix)


@pytest.mark.parametrize(("name", "share"), [("float32", 1), ("float16", 2), ("bfloat16", 2), ("int8", 4), ("int4", 8)])
def test_a_table_takes_its_share_of_the_bytes_of_float32(name: str, share: int) -> None:
    matrix = normal(0, 100, 64)
    tensors = stored(EMBEDDING_FORMATS[name](matrix, 64))
    assert len(tensors["embedding.weight"].raw_data) == matrix.nbytes / share
    scales = [tensor for name, tensor in tensors.items() if name == "embedding.scale"]
    assert sum(len(tensor.raw_data) for tensor in scales) == (200 if name.startswith("int") else 0)


# Rows.


@every_format
@settings(max_examples=15)
@given(seeds, st.sampled_from([16, 40, 64, 100]), st.sampled_from([None, 16, 32]))
def test_onnxruntime_looks_up_the_rows_of_the_restored_matrix(
    name: str, seed: int, width: int, block_size: int | None
) -> None:
    matrix = normal(seed, 30, width)
    ids = np.random.default_rng(seed).integers(30, size=(2, 7))
    restored = EMBEDDING_FORMATS[name](matrix, block_size).restored().T
    found = run_nodes(
        lambda builder: EMBEDDING_FORMATS[name](matrix, block_size).lookup(builder, "ids"), (2, 7, width), ids=ids
    )
    np.testing.assert_array_equal(found, restored[ids])
    assert np.array_equal(restored, matrix) is (name == "float32")


# Heads that are the embedding.

TIED, UNTIED = small_config(tie_word_embeddings=True), small_config()


def matrices(model: onnx.ModelProto) -> list[str]:
    """Names of the stored tensors with a number, or a part of one, for each of a vocabulary's channels."""
    smallest = TIED.vocab_size * TIED.hidden_size // 2
    return [
        tensor.name
        for tensor in model.graph.initializer
        if TIED.vocab_size in tensor.dims and len(tensor.raw_data) >= smallest
    ]


#: Every format, and what changes the codes of some.
VARIANTS = [
    *((precision, "rtn", False) for precision in LINEAR_FORMATS),
    *((precision, "gptq", False) for precision in ("int8-weight", "int4-weight")),
    *((precision, "rtn", True) for precision in ("int8-dynamic", "int8-static")),
]


@pytest.mark.parametrize(("precision", "solver", "reduce_range"), VARIANTS)
def test_a_tied_head_is_stored_once_and_computes_as_if_it_were_stored_twice(
    precision: str, solver: str, reduce_range: bool
) -> None:
    weights, tokens = random_weights(TIED), token_stream(40)
    widths = {name: 88 if name.endswith("down") else 32 for name in LINEARS}
    moments = {name: np.diag(np.arange(1.0, width + 1)) for name, width in widths.items()}
    options = FormatOptions(
        reduce_range, False, dict.fromkeys(LINEARS, (-6.0, 6.0)), WeightQuantizer(solver, 32, moments)
    )
    linear = make_format(precision, options)
    untied = dataclasses.replace(weights, config=UNTIED)

    once = build_graph(weights, linear).model
    twice = build_graph(untied, linear, embedding=linear.store(HEAD, weights.head)).model

    assert matrices(once) == ["embedding.weight"]
    assert matrices(twice) == ["embedding.weight", "head.weight"]
    contract = graph_contract(TIED)
    found, expected = (run_text(model, contract, tokens)[0] for model in (once, twice))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(expected).max() > 1
