"""Spread and neighbours: known answers, and NumPy the direct way."""

from __future__ import annotations

import numpy as np
import pytest

from expe_edge.quality.analysis.embedding import NEIGHBOURS, ROWS, Moments, nearest, neighbours

V, C, L = 300, 24, 6


def table(seed: int = 0, rows: int = V) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, C)).astype(np.float32)


def texts(count: int = V) -> list[str]:
    return [f" word{chr(97 + i % 26)}" if i % 3 else f"{i}" for i in range(count)]


def test_spread_is_that_of_all_states_together() -> None:
    generator = np.random.default_rng(0)
    documents = [generator.normal(2, 1 + np.arange(C), size=(t, C)) for t in (50, 70)]
    moments = Moments(C)
    for document in documents:
        moments.add(document)
    spread, states = moments.spread("normed", 3, L), np.concatenate(documents)

    assert (spread.place, spread.layer, spread.dims, spread.chance) == ("normed", 3, L, L / C)
    assert spread.rms_first == pytest.approx(np.sqrt((states[:, :L] ** 2).mean()))
    assert spread.rms_others == pytest.approx(np.sqrt((states[:, L:] ** 2).mean()))
    assert spread.variance_first == pytest.approx(states[:, :L].var(axis=0).mean())
    assert spread.variance_others == pytest.approx(states[:, L:].var(axis=0).mean())
    assert spread.share == pytest.approx(states[:, :L].var(axis=0).sum() / states.var(axis=0).sum())


def test_chance_is_that_of_dimensions_drawn_at_random() -> None:
    generator, moments = np.random.default_rng(0), Moments(C)
    states = generator.normal(0, 1 + np.arange(C), size=(50, C))
    moments.add(states)
    spread, share = moments.spread("residual", 1, L), states.var(axis=0) / states.var(axis=0).sum()

    drawn = [generator.permutation(share)[:L].sum() for _ in range(20_000)]
    assert spread.chance == pytest.approx(np.mean(drawn), rel=0.01)
    assert spread.chance_deviation == pytest.approx(np.std(drawn), rel=0.02)


def test_share_of_dimensions_like_any_others_is_chance() -> None:
    moments = Moments(C)
    moments.add(np.random.default_rng(0).normal(size=(20_000, C)))

    assert moments.spread("residual", 1, L).share == pytest.approx(L / C, rel=0.02)


def test_dimensions_that_no_position_enters_are_written_as_null() -> None:
    moments = Moments(C)
    moments.add(table().astype(np.float64))

    values = moments.spread("embedding", 0, 0).to_dict()
    assert [name for name, value in values.items() if value is None] == [
        *("rms_first", "variance_first", "share", "chance", "chance_deviation"),
    ]


def test_nearest_by_comparing_every_pair() -> None:
    rows = table(rows=ROWS + 30)  # more than are computed at once
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)

    found = nearest(rows, 5)
    np.testing.assert_array_equal(found, np.argsort(-cosines, axis=1)[:, :5])


def test_zeros_in_the_first_dimensions_cost_no_neighbour() -> None:
    rows = table()
    rows[:, :L] = 0
    result = neighbours(rows, L, texts(), 0)

    assert (result.overlap, result.overlap_stderr) == (1.0, 0.0)
    assert result.overlap_without_others < 0.9
    assert all(example.by_all == example.without_first for example in result.examples)


def test_what_lies_in_the_first_dimensions_alone_is_lost() -> None:
    rows = table()
    rows[:, :L] *= 100  # the others say nothing of neighbourhoods
    result = neighbours(rows, L, texts(), 0)

    assert result.overlap == pytest.approx(NEIGHBOURS / (V - 1), abs=0.03)
    assert result.overlap_without_others > 0.95


def test_dimensions_like_any_others_are_missed_as_any_others() -> None:
    result = neighbours(table(), L, texts(), 0)

    assert result.overlap == pytest.approx(result.overlap_without_others, abs=4 * result.overlap_stderr)
    assert result.overlap_without_others_stderr < result.overlap_stderr
    whole, without = (nearest(rows, NEIGHBOURS) for rows in (table(), table()[:, L:]))
    kept = [len(set(a) & set(b)) / NEIGHBOURS for a, b in zip(whole, without, strict=True)]
    assert result.overlap == pytest.approx(np.mean(kept))
    assert result.overlap_stderr == pytest.approx(np.std(kept, ddof=1) / np.sqrt(V), rel=1e-6)


def test_examples_are_words_and_the_same_again() -> None:
    names = [f"{i}" if i % 3 else "abcdefghij"[i % 10] * 3 + "xyz"[i % 7 % 3] * (i // 10) for i in range(V)]
    one, again, other = (neighbours(table(), L, names, seed).examples for seed in (0, 0, 1))

    assert one == again != other
    assert all(example.token.isalpha() and len(example.by_all) == NEIGHBOURS for example in one)
    place = names.index(one[0].token)
    assert one[0].by_all == tuple(names[i] for i in nearest(table(), NEIGHBOURS)[place])
    assert one[0].without_first == tuple(names[i] for i in nearest(table()[:, L:], NEIGHBOURS)[place])


def test_few_tokens_without_words_and_dimensions_without_others() -> None:
    result = neighbours(table(rows=4), C, ["1", "2", "3", "4"], 0)

    assert (result.tokens, result.neighbours, result.overlap) == (4, 3, 1.0)  # all three others, whatever the order
    assert np.isnan(result.overlap_without_others)
    assert len(result.examples) == 4
