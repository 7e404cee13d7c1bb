"""Recall by scorers whose answers are known, and by a trained model against PyTorch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from expe_edge.quality.comparison import long_documents
from expe_edge.quality.losses import Panel
from expe_edge.quality.needles import COPIED, CUE, PUZZLES, Case, Material, place
from expe_edge.quality.recall import DEPTHS, Grid, Recall, needle_cases, recall
from expe_edge.quality.scoring import Scorer
from expe_edge.text.tokenization import load_tokenizer
from expe_edge.training.checkpoint import load_checkpoint
from tests.quality.oracles import DOUBT, Oracle

V = 300
N = 32
SURE = -math.log(1 - DOUBT)
CERTAIN = math.log(V) - SURE  # what an oracle gains for each token that it looks up


def random_documents(count: int, tokens: int) -> list[np.ndarray]:
    """Tokens without order: nothing can be looked up in them but what is put there."""
    random = np.random.default_rng(5)
    return [np.concatenate([[0], random.integers(1, V, tokens - 1)]) for _ in range(count)]


def asked(checkpoint: Path, oracle: Oracle, grid: Grid, documents: int = 2) -> tuple[Recall, ...]:
    texts = random_documents(documents, grid.lengths[-1] + CUE + COPIED)
    return recall(Panel([oracle]), needle_cases(grid, texts, load_tokenizer(checkpoint)))


@pytest.mark.parametrize("probe", PUZZLES)
def test_an_oracle_recalls_from_any_distance(checkpoint: Path, probe: str) -> None:
    oracle = Oracle(checkpoint, V, first=probe == "first-definition")

    results = asked(checkpoint, oracle, Grid((probe,), (400, 700), (0.0, 0.5, 1.0), 2))

    assert [(r.length, r.depth) for r in results] == [(n, d) for n in (400, 700) for d in (0.0, 0.5, 1.0)]
    for result in results:
        assert (result.exact_match, result.exact_match_stderr) == (1, 0)
        assert (result.model, result.probe, result.cases, result.documents) == ("model", probe, 2, 2)
        assert result.loss == pytest.approx(SURE, rel=1e-3)
        assert result.gained == pytest.approx(result.loss_without - result.loss)
        assert result.gained > 0.1
    distances = [result.distance for result in results[3:]]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 300


def test_which_definition_an_oracle_takes(checkpoint: Path) -> None:
    grid = Grid(("first-definition", "last-definition"), (400,), (0.0, 1.0), 2)

    exact = {
        first: [r.exact_match for r in asked(checkpoint, Oracle(checkpoint, V, first=first), grid)]
        for first in (False, True)
    }

    assert exact == {False: [0, 0, 1, 1], True: [1, 1, 0, 0]}


def test_nothing_is_gained_by_a_scorer_that_knows_nothing(checkpoint: Path) -> None:
    for result in asked(checkpoint, Oracle(checkpoint, V, window=0), Grid(tuple(PUZZLES), (300,), (0.0, 1.0), 2)):
        assert result.exact_match == 0
        assert result.loss == pytest.approx(math.log(V))
        assert result.loss_without == pytest.approx(math.log(V))
        assert result.gained == 0


def copy_at(distance: int, window: int, checkpoint: Path) -> Recall:
    """Ask an oracle of a window for a passage that stands `distance` tokens before the answer."""
    (document,) = random_documents(1, 400)
    puzzle = PUZZLES["copying"](Material(None, 0, 0, 0.0, document[300:]))
    highest = 300 - 2 * (CUE + COPIED)  # where the passage may begin last, and 1 where it may first
    begin = 300 - COPIED - CUE - distance
    case = place("copying", puzzle, document[:300], (begin - 1) / (highest - 1))
    assert case.distance == distance
    (result,) = recall(Panel([Oracle(checkpoint, V, window, shortest=CUE)]), [case])
    assert result.distance == distance
    return result


@pytest.mark.parametrize("window", [100, 101, 150])
def test_a_window_recalls_up_to_its_edge_and_nothing_beyond(checkpoint: Path, window: int) -> None:
    """The first copied token is looked up with its cue before it, so that both must be within the window."""
    edge = window - CUE
    inside, outside = copy_at(edge, window, checkpoint), copy_at(edge + 1, window, checkpoint)

    assert inside.exact_match == 1
    assert inside.gained == pytest.approx(CERTAIN, rel=1e-3)
    assert (outside.exact_match, outside.gained) == (0, 0)
    assert outside.loss == pytest.approx(math.log(V))


def test_a_window_by_depth(checkpoint: Path) -> None:
    results = asked(checkpoint, Oracle(checkpoint, V, window=120, shortest=CUE), Grid(("copying",), (400,), DEPTHS, 2))

    assert [r.exact_match for r in results] == [0, 0, 0, float(results[3].distance <= 112), 1]
    assert [r.gained == 0 for r in results[:3]] == [True] * 3


def test_figures_over_documents_by_hand(checkpoint: Path) -> None:
    """Document 0 has two cases, one of them recalled; document 1 has one, recalled."""
    answer = np.array([7, 8])
    context = np.concatenate([[0], np.arange(20, 60)])

    def case(document: int, recalled: bool) -> Case:
        known = np.array([10, 11, 7, 8]) if recalled else np.array([12, 13, 14, 15])
        texts = [np.concatenate([context, needle, [30, 10, 11], answer]) for needle in (known, np.array([1, 2, 3, 4]))]
        return Case("p", document, len(texts[0]), 0.5, texts[0], texts[1], 43, len(texts[0]) - 2)

    oracle = Oracle(checkpoint, V, shortest=2)
    (result,) = recall(Panel([oracle]), [case(0, True), case(0, False), case(1, True)])

    assert (result.documents, result.cases, result.distance) == (2, 3, 5)
    assert result.exact_match == pytest.approx(2 / 3)
    # Cochran's ratio estimator: residuals 1 − 2·(2/3) and 1 − 2/3
    assert result.exact_match_stderr == pytest.approx(math.sqrt(2 * (2 * (1 / 3) ** 2)) / 3)
    assert result.gained == pytest.approx(CERTAIN * 2 / 3, rel=1e-4)
    assert result.loss_without == pytest.approx(math.log(V), rel=1e-6)


def test_one_wrong_token_is_no_exact_match(checkpoint: Path) -> None:
    text = np.array([0, 10, 11, 7, 8, 9, 20, 21, 10, 11, 7, 5, 9])  # 7 is recalled, 5 is not
    case = Case("p", 0, len(text), 0.5, text, np.where(np.arange(len(text)) == 3, 3, text), 3, 10)

    (result,) = recall(Panel([Oracle(checkpoint, V, shortest=2)]), [case])

    assert result.exact_match == 0
    assert result.gained > 0


def losses_in_pytorch(checkpoint: Path, tokens: np.ndarray, begin: int) -> tuple[float, bool]:
    """Loss of all tokens from `begin` on, and whether each is the likeliest, in one uncached pass."""
    with torch.inference_mode():
        logits = load_checkpoint(checkpoint).model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].double()
    predicted, targets = logits[begin - 1 : -1], torch.from_numpy(tokens[begin:])
    exact = bool((predicted.argmax(-1) == targets).all())
    return torch.nn.functional.cross_entropy(predicted, targets).item(), exact


def test_figures_of_a_trained_model_are_those_of_pytorch(scorers: Sequence[Scorer], checkpoint: Path) -> None:
    documents, _ = long_documents(scorers[0], (), "text", 8 * N + CUE + COPIED, 2)
    grid = Grid(("passkey", "copying"), (8 * N,), (0.5,), 2)
    made = list(needle_cases(grid, documents, load_tokenizer(checkpoint)))

    results = recall(Panel(scorers, at_once=2), made)

    assert [r.model for r in results] == [name for name in ("model", "float32", "int8-dynamic") for _ in range(2)]
    for result in results:
        theirs = [case for case in made if case.probe == result.probe]
        with_answer, exact = zip(*(losses_in_pytorch(checkpoint, c.tokens, c.answer) for c in theirs), strict=True)
        without = [losses_in_pytorch(checkpoint, c.without, c.answer)[0] for c in theirs]
        weights = [len(c.tokens) - c.answer for c in theirs]
        tolerance = 0.1 if result.model == "int8-dynamic" else 1e-4
        assert result.loss == pytest.approx(np.average(with_answer, weights=weights), abs=tolerance)
        gained = np.average(np.subtract(without, with_answer), weights=weights)
        assert result.gained == pytest.approx(gained, abs=tolerance)
        if result.model != "int8-dynamic":
            assert result.exact_match == np.mean(exact)


def test_advance_counts_both_texts_of_every_case(checkpoint: Path) -> None:
    calls: list[int] = []
    grid = Grid(("passkey", "keys"), (300,), (0.0, 1.0), 2)
    made = needle_cases(grid, random_documents(1, 400), load_tokenizer(checkpoint))

    recall(Panel([Oracle(checkpoint, V, window=0)]), made, calls.append)

    assert sum(calls) == grid.tokens


def test_one_document_has_no_standard_error(checkpoint: Path) -> None:
    (result,) = asked(checkpoint, Oracle(checkpoint, V, window=0), Grid(("passkey",), (300,), (0.5,), 2), documents=1)

    assert math.isnan(result.gained_stderr)
    assert result.to_dict()["gained_stderr"] is None
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["cases"] == 2
