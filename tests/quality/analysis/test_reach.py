"""Reach, sinks and entropy: heads whose attention is known in closed form, and every definition by brute force."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.quality.analysis.reach import SINKS, TAIL, Reached, first_query, head_reaches, reached
from expe_edge.quality.analysis.slopes import HeadSlopes, head_slopes
from tests.quality.analysis.test_observing import Recorder, observed
from tests.strategies import random_model, small_config

LENGTH = 600
SLOPES = (0.5, 0.2, 0.1, 0.05)


def contentless(**changes: Any) -> ExPEForCausalLM:
    """A model whose scores hold nothing but what positions add."""
    model = random_model(small_config(num_key_value_heads=4, **changes))
    heads, dims = model.positional.heads, model.config.encoding_parameters.position_dims
    for block in model.blocks:
        block.attention.qkv.weight[: heads.query_rows + heads.key_rows, dims:] = 0
    return model


def seen_of(model: ExPEForCausalLM) -> Recorder:
    return observed(model, first_query(LENGTH), LENGTH)


@pytest.mark.parametrize(
    ("changes", "slopes"),
    [
        ({"positional_parameters": {"slopes": SLOPES}}, SLOPES),
        ({"positional": "exqpe", "positional_parameters": {"slopes": SLOPES}}, SLOPES),
        ({"positional": "alibi"}, (0.25, 0.0625)),
    ],
    ids=["expe", "exqpe", "alibi"],
)
def test_a_head_without_content_reaches_as_far_as_its_slope_says(
    changes: dict[str, Any], slopes: tuple[float, ...]
) -> None:
    """Attention falls as exp(−slope·d): beyond distance d lies exp(−slope·(d + 1)) of it."""
    seen = seen_of(contentless(**changes))
    heads = head_reaches(1, [reached(seen.weights[1])])
    found = seen.views[1].slopes
    assert found is not None

    for slope, head, own in zip(slopes, heads, head_slopes(1, [found.numpy()])[:: found.shape[-1]], strict=False):
        farthest = math.ceil(-math.log(TAIL) / slope - 1)
        assert (head.reach_median, head.reach_90) == (farthest, farthest)
        assert head.sinks < 1e-5
        # The entropy of a geometric distribution with ratio r, of which little is cut off.
        ratio = math.exp(-slope)
        entropy = -math.log(1 - ratio) - ratio / (1 - ratio) * math.log(ratio)
        assert head.entropy == pytest.approx(entropy, rel=1e-3)
        assert own.quantiles == pytest.approx([slope] * 5, rel=1e-5)
        assert own.negative == 0


def test_a_head_that_attends_to_everything_alike() -> None:
    (head, *_) = head_reaches(1, [reached(seen_of(contentless(positional="none")).weights[1])])
    lengths = np.arange(LENGTH // 2, LENGTH) + 1

    assert head.queries == LENGTH // 2
    assert head.entropy == pytest.approx(np.log(lengths).mean())
    assert head.sinks == pytest.approx((SINKS / lengths).mean())
    assert head.reach_median == pytest.approx(np.median(lengths - 1 - SINKS), abs=1)


def test_heads_that_look_far_have_negative_slopes() -> None:
    model = contentless(positional_parameters={"slopes": (-0.5, 0.5, -0.1, 0.1)})
    seen = seen_of(model)
    slopes = seen.views[1].slopes
    assert slopes is not None

    assert [head.negative for head in head_slopes(1, [slopes.numpy()])] == [1, 0, 1, 0]
    assert head_reaches(1, [reached(seen.weights[1])])[0].sinks == pytest.approx(1, abs=1e-3)


def brute_force(weights: np.ndarray, query: int) -> int:
    """The least distance beyond which no more than TAIL lies, but for the first tokens, by trying each."""
    for distance in range(query + 1):
        if sum(float(weights[key]) for key in range(SINKS, query - distance)) <= TAIL:
            return distance
    raise AssertionError


def test_reach_by_trying_every_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 6 * torch.randn(3, 40, 60, generator=generator)
    weights = scores.masked_fill(torch.ones(40, 60, dtype=torch.bool).triu(21), -torch.inf).softmax(-1)

    found = reached([(20, weights[:, :15, :35]), (35, weights[:, 15:])])

    expected = [[brute_force(row, 20 + i) for i, row in enumerate(head)] for head in weights.numpy()]
    np.testing.assert_array_equal(found.reach, expected)
    np.testing.assert_allclose(found.sinks, weights[..., :SINKS].sum(-1), rtol=1e-6)
    logs = np.log(np.where(weights > 0, weights, 1))
    np.testing.assert_allclose(found.entropy, -(weights.numpy() * logs).sum(-1), rtol=1e-4)


def test_a_query_that_looks_at_the_first_tokens_alone_reaches_nowhere() -> None:
    weights = torch.zeros(1, 2, 40)
    weights[..., 3] = 1

    assert reached([(38, weights)]).reach.tolist() == [[0, 0]]


def test_queries_of_all_documents_count() -> None:
    def document(*reaches: int) -> Reached:
        return Reached(np.array([reaches]), np.full((1, len(reaches)), 0.25), np.array([np.array(reaches) / 2]))

    (head,) = head_reaches(3, [document(*range(1, 8)), document(*range(8, 21))])

    assert (head.layer, head.head, head.queries) == (3, 1, 20)
    assert (head.reach_median, head.reach_90, head.sinks, head.entropy) == (10, 18, 0.25, 5.25)


def test_slopes_of_all_documents_count() -> None:
    ramp = np.arange(-20, 81, dtype=np.float32)
    documents = [part[None, :, None] for part in (ramp[:30], ramp[30:])]

    assert head_slopes(2, documents) == [HeadSlopes(2, 1, None, (-15.0, 5.0, 30.0, 55.0, 75.0), 20 / 101)]
    assert head_slopes(2, []) == []


def test_every_head_and_limb_has_its_own() -> None:
    observed = np.array([[[1, 10], [3, -30]], [[5, 50], [7, 70]]], dtype=np.float32)  # (heads, queries, limbs)

    found = [(s.head, s.limb, s.quantiles[2], s.negative) for s in head_slopes(1, [observed])]
    assert found == [(1, 0, 2, 0), (1, 1, -10, 0.5), (2, 0, 6, 0), (2, 1, 60, 0)]
