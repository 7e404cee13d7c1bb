"""Quantization-aware fine-tuning: rounding exactly as an export does, learning through it, an ordinary checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from expe_edge.export.fold import extract_weights
from expe_edge.graph.build import build_graph, graph_contract
from expe_edge.graph.linears import Float32
from expe_edge.quant import blocks
from expe_edge.quant.channels import quantize_channels
from expe_edge.quant.recipe import WeightRounding
from expe_edge.training.rounding import FakeQuantizer, round_to_nearest, round_weights
from tests.graphs import normal, run_text
from tests.rounding import ROUNDINGS, rounded, seen, stored
from tests.strategies import expe_of, random_model, random_tokens, small_config

#: Models that differ in what is rounded: position columns or none, tied or not.
MODELS: dict[str, dict[str, Any]] = {
    "expe": {"positional_parameters": {"dims": 8}},
    "expe, paper": {"positional_parameters": {"dims": 8, "where": "query_key"}},
    "expe in values": {"positional_parameters": {"dims": 8, "where": "query_key_value"}},
    "expe added": {"positional_parameters": {"dims": 8, "how": "add"}},
    "exqpe": {"positional": "exqpe", "positional_parameters": {"dims": 12, "limb_bits": 2}},
    "rotary": {"positional": "rotary"},
    "tied": {"tie_word_embeddings": True},
}


# Rounding.

#: Weights of almost any size a float32 can have, and small integers, among which the largest is rarely alone.
matrices = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=20),
    elements=st.floats(-(2.0**120), 2.0**120, width=32) | st.integers(-3, 3).map(float),
)


def bytes_of(matrix: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(matrix).view(np.uint32)


@given(matrix=matrices, bits=st.sampled_from((4, 8)), block_size=st.sampled_from((3, 8, 16)))
def test_blocks_are_rounded_bit_for_bit_as_numpy_does(matrix: np.ndarray, bits: int, block_size: int) -> None:
    ours = round_to_nearest(torch.from_numpy(matrix), bits, block_size).numpy()

    theirs = blocks.round_to_nearest(matrix, bits, block_size).restored()
    np.testing.assert_array_equal(bytes_of(ours), bytes_of(theirs))


@given(matrix=matrices)
def test_rows_are_rounded_bit_for_bit_as_numpy_does(matrix: np.ndarray) -> None:
    ours = round_to_nearest(torch.from_numpy(matrix), 8, None).numpy()

    np.testing.assert_array_equal(bytes_of(ours), bytes_of(quantize_channels(matrix.T).restored().T))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_scales_of_weights_of_every_size_are_rounded_alike(bits: int, size: float) -> None:
    """Magnitudes for which scales are stored in half precision, and in float32."""
    matrix = normal(0, 300, 200) * np.float32(size)

    ours = round_to_nearest(torch.from_numpy(matrix), bits, 64).numpy()

    np.testing.assert_array_equal(bytes_of(ours), bytes_of(blocks.round_to_nearest(matrix, bits, 64).restored()))


def test_the_gradient_passes_straight_through() -> None:
    weight = torch.from_numpy(normal(0, 6, 40)).requires_grad_()
    upstream = torch.from_numpy(normal(1, 6, 40))

    (gradient,) = torch.autograd.grad((FakeQuantizer(4, 16)(weight) * upstream).sum(), weight)

    torch.testing.assert_close(gradient, upstream, rtol=0, atol=0)


# The whole model.


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=lambda rounding: f"{rounding.precision}-{rounding.block_size}")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_forward_weights_are_those_that_an_export_stores(name: str, rounding: WeightRounding) -> None:
    model = random_model(small_config(**MODELS[name]))

    ours, theirs = seen(rounded(model, rounding)), stored(extract_weights(model, folded=True), rounding)

    for field in ("embedding", "head"):
        np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field), err_msg=field)
    for our_layer, their_layer in zip(ours.layers, theirs.layers, strict=True):
        for field in ("qkv", "out", "up", "down"):
            np.testing.assert_array_equal(getattr(our_layer, field), getattr(their_layer, field), err_msg=field)


@pytest.mark.parametrize("name", MODELS)
def test_the_forward_pass_is_the_exported_graphs(name: str) -> None:
    """Far past the training length too: slopes and positions are taken from float weights on both sides."""
    config, rounding = small_config(**MODELS[name]), WeightRounding("int4-weight", 16)
    model = random_model(config)
    (tokens,) = random_tokens(config, 280)

    graph = build_graph(stored(extract_weights(model, folded=True), rounding), Float32())
    theirs, _ = run_text(graph.model, graph_contract(config), tokens)

    with torch.no_grad():
        ours = rounded(model, rounding)(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()
    assert np.abs(ours - theirs).max() < 1e-3
    assert np.abs(model(input_ids=torch.from_numpy(tokens)[None]).logits[0].numpy() - theirs).max() > 0.1


@pytest.mark.parametrize("name", ["expe", "expe in values", "exqpe"])
def test_position_columns_stay_as_they_are(name: str) -> None:
    """A model whose content is rounded already computes the same when rounded again, however odd its positions."""
    rounding = WeightRounding("int4-weight", 16)
    model = random_model(small_config(**MODELS[name]))
    weights = stored(extract_weights(model, folded=True), rounding)
    rows, dims = expe_of(model).positioned_rows, expe_of(model).spec.dims
    model.embedding.weight.copy_(torch.from_numpy(weights.embedding))
    model.head.weight.copy_(torch.from_numpy(weights.head.T.copy()))
    for block, layer in zip(model.blocks, weights.layers, strict=True):
        content = torch.from_numpy(layer.qkv.T.copy())
        content[:rows, :dims] = block.attention.qkv.weight[:rows, :dims]
        block.attention.qkv.weight.copy_(content)
        block.attention.out.weight.copy_(torch.from_numpy(layer.out.T.copy()))
        block.feed_forward.up.weight.copy_(torch.from_numpy(layer.up.T.copy()))
        block.feed_forward.down.weight.copy_(torch.from_numpy(layer.down.T.copy()))
    tokens = torch.from_numpy(random_tokens(model.config, 40))

    torch.testing.assert_close(rounded(model, rounding)(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_learns(name: str) -> None:
    model = rounded(random_model(small_config(**MODELS[name])).requires_grad_(True), ROUNDINGS[0])
    tokens = torch.from_numpy(random_tokens(model.config, 20))

    model.train()(input_ids=tokens, labels=tokens).loss.backward()

    for parameter, values in model.named_parameters():
        assert values.grad is not None, parameter
        assert bool(values.grad.abs().sum() > 0), parameter


def test_rounding_leaves_parameters_and_their_names() -> None:
    model = random_model(small_config(tie_word_embeddings=True))
    before = {name: values.clone() for name, values in model.state_dict().items()}

    round_weights(model, ROUNDINGS[0])

    assert model.state_dict().keys() == before.keys()
    assert model.head.weight is model.embedding.weight
    for name, values in model.state_dict().items():
        torch.testing.assert_close(values, before[name], rtol=0, atol=0, msg=name)
