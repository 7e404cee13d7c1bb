"""What is observed against the plain model of `tests.reference`: streams, attention weights, slopes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from expe_edge.model.attention import QUERY_BLOCK
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.positions.expe import alibi_slopes
from expe_edge.quality.analysis.observing import AttentionView, observe
from tests import reference
from tests.strategies import random_model, random_tokens, small_config

#: Queries of two blocks.
LENGTH = QUERY_BLOCK + 20
LIMBS = {"dims": 12, "limbs": 2, "limb_bits": 4, "start": 0.5, "step": 0.125}
ENCODINGS: dict[str, dict[str, Any]] = {
    "expe": {},
    "expe, paper": {"positional_parameters": {"where": "query_key"}},
    "expe, values": {"positional_parameters": {"where": "query_key_value"}},
    "expe, embedding": {"positional_parameters": {"where": "embedding", "dims": 8}},
    "exqpe": {"positional": "exqpe", "positional_parameters": LIMBS},
    **{name: {"positional": name} for name in ("rotary", "sinusoidal", "relative", "alibi", "none")},
}
every_encoding = pytest.mark.parametrize("changes", ENCODINGS.values(), ids=ENCODINGS)


class Recorder:
    """Keeps all that it is shown."""

    def __init__(self, first: int = 0) -> None:
        self.first = first
        self.residuals: dict[int, Tensor] = {}
        self.views: dict[int, AttentionView] = {}
        self.weights: dict[int, list[tuple[int, Tensor]]] = {}

    def residual(self, layer: int, hidden: Tensor) -> None:
        self.residuals[layer] = hidden

    def attention(self, layer: int, view: AttentionView) -> None:
        self.views[layer], self.weights[layer] = view, list(view.weights(self.first))


def observed(model: ExPEForCausalLM, first: int = 0, length: int = LENGTH) -> Recorder:
    recorder = Recorder(first)
    observe(model, random_tokens(model.config, length)[0], recorder)
    return recorder


def dense(model: ExPEForCausalLM, layer: int, normed: Tensor) -> np.ndarray:
    """Weights (H, T, T) of a layer for what enters its attention, in float64 at once."""
    weights = reference.model_weights(model)
    fused = weights[f"blocks.{layer - 1}.attention.qkv.weight"]
    return reference.attention_weights(model.config, weights, fused, normed.double().numpy(), np.arange(len(normed)))


@every_encoding
def test_attention_weights_are_those_of_a_dense_softmax(changes: dict[str, Any]) -> None:
    model = random_model(small_config(**changes))
    seen = observed(model)

    for layer in (1, 2):
        expected = dense(model, layer, seen.views[layer].normed)
        assert [begin for begin, _ in seen.weights[layer]] == [0, QUERY_BLOCK]
        for begin, weights in seen.weights[layer]:
            queries, keys = weights.shape[1:]
            np.testing.assert_allclose(weights, expected[:, begin : begin + queries, :keys], atol=2e-4)
            assert not expected[:, begin : begin + queries, keys:].any()


@pytest.mark.parametrize(
    ("first", "begins"),
    [(40, [40, QUERY_BLOCK]), (QUERY_BLOCK, [QUERY_BLOCK]), (QUERY_BLOCK + 5, [QUERY_BLOCK + 5])],
)
def test_weights_of_the_later_queries_alone(first: int, begins: list[int]) -> None:
    model = random_model(small_config())
    whole, later = observed(model).weights[1], observed(model, first).weights[1]

    assert [begin for begin, _ in later] == begins
    rows = torch.cat([torch.nn.functional.pad(weights, (0, LENGTH - weights.shape[2])) for _, weights in whole], dim=1)
    for begin, weights in later:
        assert torch.equal(weights, rows[:, begin : begin + weights.shape[1], : weights.shape[2]])
    assert later[-1][0] + later[-1][1].shape[1] == LENGTH


@every_encoding
def test_streams_are_the_models_own(changes: dict[str, Any]) -> None:
    model = random_model(small_config(**changes))
    seen = observed(model)
    tokens = torch.from_numpy(random_tokens(model.config, LENGTH))

    assert list(seen.residuals) == [0, 1, 2]
    weights = reference.model_weights(model)
    start = reference.embed(model.config, weights["embedding.weight"][tokens[0].numpy()], np.arange(LENGTH))
    np.testing.assert_allclose(seen.residuals[0], start, atol=1e-4)
    assert torch.equal(model.norm(seen.residuals[2])[None], model.hidden_states(tokens))
    for layer, block in enumerate(model.blocks, 1):
        assert torch.equal(seen.views[layer].normed, block.attention_norm(seen.residuals[layer - 1]))


def test_nothing_is_left_on_the_model() -> None:
    model = random_model(small_config())
    observed(model)

    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["expe", "expe, paper", "expe, values", "exqpe"])
def test_slopes_are_queries_times_what_one_position_adds_to_keys(name: str) -> None:
    model = random_model(small_config(**ENCODINGS[name]))
    config, positions = model.config, np.arange(LENGTH)
    seen = observed(model).views[1]
    slopes = seen.slopes
    assert slopes is not None

    rows, size = config.num_attention_heads * config.head_dim, config.head_dim
    fused = reference.model_weights(model)["blocks.0.attention.qkv.weight"]
    queries = reference.attention_inputs(config, seen.normed.double().numpy(), positions)[0] @ fused[:rows].T
    dims, limbs = config.positional_parameters["dims"], slopes.shape[-1]
    step = reference.spread(config, "step", half=1)
    for limb in range(limbs):
        own = np.arange(dims) * limbs // dims == limb
        key_steps = fused[rows : rows + config.num_key_value_heads * size, :dims] @ (step * own)
        for head in range(config.num_attention_heads):
            group = head * config.num_key_value_heads // config.num_attention_heads
            per_unit = queries[:, head * size : (head + 1) * size] @ key_steps[group * size : (group + 1) * size]
            expected = per_unit / np.sqrt(size) / 16**limb
            np.testing.assert_allclose(slopes[head, :, limb], expected, rtol=1e-4, atol=1e-5)


def test_constant_slopes() -> None:
    heads = small_config().num_attention_heads
    slopes = observed(random_model(small_config(positional="alibi"))).views[2].slopes

    assert slopes is not None
    expected = torch.tensor(alibi_slopes(heads))[:, None, None].expand(-1, LENGTH, 1)
    torch.testing.assert_close(slopes, expected)


@pytest.mark.parametrize("name", ["expe, embedding", "rotary", "sinusoidal", "relative", "none"])
def test_encodings_without_slopes(name: str) -> None:
    assert observed(random_model(small_config(**ENCODINGS[name])), length=40).views[1].slopes is None
