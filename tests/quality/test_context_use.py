"""Context use and loss by position: by scorers whose figures are known, and by a trained model against PyTorch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from expe_edge.errors import ConfigError
from expe_edge.quality.comparison import long_documents
from expe_edge.quality.context_use import ContextUse, context_use, near_tokens, require_far
from expe_edge.quality.loss_by_position import bin_edges, loss_by_position
from expe_edge.quality.losses import Panel, document_losses
from expe_edge.quality.scoring import Scorer
from expe_edge.training.checkpoint import load_checkpoint
from tests.quality.oracles import DOUBT, LONGEST, Oracle

V = 300
N = 32
SURE = -math.log(1 - DOUBT)


def repeated(count: int, period: int, tokens: int) -> list[np.ndarray]:
    """Documents of random tokens that repeat after `period` tokens."""
    random = np.random.default_rng(2)
    return [np.resize(random.permutation(np.arange(1, V))[:period], tokens).astype(np.int64) for _ in range(count)]


def used(oracle: Scorer, documents: list[np.ndarray], lengths: Sequence[int], near: int = 1) -> tuple[ContextUse, ...]:
    panel = Panel([oracle])
    losses = document_losses(panel, documents, lengths[-1] * N)
    return context_use(panel, documents, losses, lengths, near)


def test_what_repeats_beyond_n_is_gained_by_who_sees_it() -> None:
    """The period is 2·N + 10: within 2·N nothing has repeated, at 4·N all targets have."""
    documents = repeated(3, 2 * N + 10, 8 * N + 1)

    two, four, eight = used(Oracle(Path("m"), V), documents, (1, 2, 4, 8))

    assert [(r.length, r.tokens, r.documents) for r in (two, four, eight)] == [
        (n * N, 3 * N // 2, 3) for n in (2, 4, 8)
    ]
    assert (two.gained, two.gained_stderr) == (0, 0)
    for result in (four, eight):
        assert result.full_loss == pytest.approx(SURE, rel=1e-3)
        assert result.near_loss == pytest.approx(math.log(V))
        assert result.gained == pytest.approx(math.log(V) - SURE)


@pytest.mark.parametrize("period", [20, 40])
def test_a_window_within_n_gains_nothing(period: int) -> None:
    """It sees 28 tokens: with the last N it has as many in every pass, for strides are 4."""
    documents = repeated(3, period, 4 * N + 1)

    for result in used(Oracle(Path("m"), V, window=28), documents, (2, 4)):
        assert (result.gained, result.gained_stderr) == (0, 0)
        assert result.full_loss == pytest.approx(SURE if period == 20 else math.log(V), rel=1e-3)


def test_a_window_beyond_n_gains() -> None:
    documents = repeated(3, 40, 4 * N + 1)

    assert used(Oracle(Path("m"), V, window=44), documents, (4,))[0].gained == pytest.approx(math.log(V) - SURE)
    assert used(Oracle(Path("m"), V, window=43), documents, (4,))[0].gained == 0  # 40 back, and 4 tokens to match


def test_a_window_within_the_near_text_asked_for_gains_nothing() -> None:
    """At a length that near text covers there is nothing farther back."""
    documents = repeated(3, 40, 4 * N + 1)

    (result,) = used(Oracle(Path("m"), V, window=44), documents, (1, 2, 4), near=2)

    assert (result.length, result.near, result.tokens) == (4 * N, 2 * N, 3 * N // 2)
    assert result.full_loss == result.near_loss == pytest.approx(SURE, rel=1e-3)


def test_what_far_text_harms_is_a_gain_below_zero() -> None:
    """At the beginning every 8 tokens of a cycle have another successor, which a model that looks there says."""
    cycle = np.arange(1, 11)
    misleading = [np.append(np.roll(cycle, -first)[:LONGEST], 20 + first) for first in range(len(cycle))]
    document = np.concatenate([*misleading, np.resize(cycle, 8 * N)])[: 8 * N + 1]

    (result,) = used(Oracle(Path("m"), V, first=True), [document], (8,), near=2)

    assert result.near_loss == pytest.approx(SURE, rel=1e-3)
    assert result.full_loss == pytest.approx(-math.log(DOUBT / (V - 1)))
    assert result.gained == pytest.approx(result.near_loss - result.full_loss)


def test_a_scorer_that_knows_nothing_has_the_loss_of_the_vocabulary() -> None:
    (result,) = used(Oracle(Path("m"), V, window=0), repeated(2, 20, 2 * N + 1), (2,))

    assert result.full_loss == result.near_loss == pytest.approx(math.log(V))
    assert result.gained == 0


def losses_in_pytorch(checkpoint: Path, tokens: np.ndarray) -> np.ndarray:
    """Loss of every token but the first, in one uncached pass."""
    with torch.inference_mode():
        logits = load_checkpoint(checkpoint).model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].double()
    return np.asarray(torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(tokens[1:]), reduction="none"))


@pytest.mark.parametrize("width", [1, 2])
def test_a_trained_model_is_read_as_pytorch_reads_it(scorers: Sequence[Scorer], checkpoint: Path, width: int) -> None:
    """Target by target, with the tokens counted anew."""
    documents, _ = long_documents(scorers[0], (), "text", 8 * N + 1, 3)
    panel = Panel(scorers[:2], at_once=2)
    losses = document_losses(panel, documents, 8 * N)

    results = context_use(panel, documents, losses, (4, 8), width)

    assert [(r.model, r.length) for r in results] == [(m, n * N) for m in ("model", "float32") for n in (4, 8)]
    for result in results:
        targets = range(result.length - N // 2 + 1, result.length + 1)
        full = [losses_in_pytorch(checkpoint, d[: result.length + 1])[[t - 1 for t in targets]] for d in documents]
        near = []
        for document in documents:
            of_document = []
            for target in targets:
                stride_end = result.length - (result.length - target) // 4 * 4
                window = document[stride_end - width * N : target + 1]
                assert width * N - 4 < len(window) - 1 <= width * N
                of_document.append(losses_in_pytorch(checkpoint, window)[-1])
            near.append(of_document)
        gained = np.mean(near, axis=1) - np.mean(full, axis=1)
        assert result.full_loss == pytest.approx(np.mean(full), abs=1e-4)
        assert result.near_loss == pytest.approx(np.mean(near), abs=1e-4)
        assert result.gained == pytest.approx(gained.mean(), abs=1e-4)
        assert result.gained_stderr == pytest.approx(gained.std(ddof=1) / math.sqrt(3), abs=1e-4)


def test_losses_by_position_are_those_of_pytorch(scorers: Sequence[Scorer], checkpoint: Path) -> None:
    documents, _ = long_documents(scorers[0], (), "text", 300, 2)
    losses = document_losses(Panel(scorers[:2]), documents, 299)
    theirs = np.stack([losses_in_pytorch(checkpoint, document[:300]) for document in documents])

    results = loss_by_position(("model", "float32"), losses)

    np.testing.assert_allclose(losses[0], theirs, atol=1e-4)
    np.testing.assert_allclose(losses[1], theirs, atol=1e-3)
    edges = [0, 16, 23, 32, 45, 64, 91, 128, 181, 256, 299]
    of_first = [r for r in results if r.model == "model"]
    assert [r.bin_start for r in of_first] == edges[:-1]
    assert [r.bin_end for r in of_first] == edges[1:]
    for result in of_first:
        part = theirs[:, result.bin_start : result.bin_end]
        assert result.loss == pytest.approx(part.mean(), abs=1e-4)
        assert result.loss_stderr == pytest.approx(part.mean(axis=1).std(ddof=1) / math.sqrt(2), abs=1e-4)
        assert result.tokens == part.size


@pytest.mark.parametrize(
    ("tokens", "edges"), [(10, [0, 10]), (16, [0, 16]), (17, [0, 16, 17]), (64, [0, 16, 23, 32, 45, 64])]
)
def test_edges_of_bins(tokens: int, edges: list[int]) -> None:
    assert bin_edges(tokens) == edges


@pytest.mark.parametrize("begin", [1, 2, 255, 256, 257, 258, 299])
def test_predictions_from_any_token_on_are_those_of_the_whole(begin: int) -> None:
    (document,) = repeated(1, 40, 300)
    oracle = Oracle(Path("m"), V)
    whole, part = oracle.predictions(document, 1), oracle.predictions(document, begin)

    np.testing.assert_array_equal(part.nll, whole.nll[begin - 1 :])
    np.testing.assert_array_equal(part.likeliest, whole.likeliest[begin - 1 :])
    assert not whole.likeliest[:43].any()  # 40 tokens until it repeats, and 4 to match
    assert whole.likeliest[43:].all()


@pytest.mark.parametrize("near", [1, 2])
def test_advance_counts_every_pass(near: int) -> None:
    calls: list[int] = []
    panel, documents = Panel([Oracle(Path("m"), V, window=0)]), repeated(2, 20, 4 * N + 1)

    losses = document_losses(panel, documents, 4 * N, calls.append)
    assert sum(calls) == 2 * 4 * N
    calls.clear()
    context_use(panel, documents, losses, (1, 2, 4), near, calls.append)
    assert sum(calls) == 2 * near_tokens((1, 2, 4), near, N)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_a_model_of_a_few_tokens_has_targets_too(length: int) -> None:
    oracle, calls = Oracle(Path("m"), V, window=0), list[int]()
    oracle.training_length = length
    panel, documents = Panel([oracle]), repeated(2, 20, 4 * length + 1)

    losses = document_losses(panel, documents, 4 * length)
    results = context_use(panel, documents, losses, (1, 2, 4), 1, calls.append)

    assert [result.tokens for result in results] == [2 * min(length, 4)] * 2
    assert all(result.near_loss == pytest.approx(math.log(V)) for result in results)
    assert sum(calls) == 2 * near_tokens((1, 2, 4), 1, length)


def test_results_are_plain_data() -> None:
    (result,) = used(Oracle(Path("m"), V, window=0), repeated(1, 20, 2 * N + 1), (2,))

    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert values["gained_stderr"] is None  # of one document
    assert values["length"] == 2 * N


def test_lengths_within_n_have_no_far_text() -> None:
    require_far([1, 2], 1)
    with pytest.raises(ConfigError, match="`lengths` end at 1: context use is measured beyond 1, as `near` says"):
        require_far([1], 1)
    with pytest.raises(ConfigError, match="`lengths` end at 2: context use is measured beyond 2"):
        require_far([1, 2], 2)
    with pytest.raises(ConfigError, match="`near` is 0; at least 1"):
        require_far([1, 2], 0)
