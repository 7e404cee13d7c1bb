"""Needles stand where a case says, and nothing else of the text changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from expe_edge.errors import ConfigError
from expe_edge.quality.needles import COPIED, CUE, KEYS, PUZZLES, Case, Material, place
from expe_edge.quality.recall import DEPTHS, Grid, needle_cases
from expe_edge.text.tokenization import load_tokenizer
from tests.quality.oracles import Tokenizer, tokenizer_of

LENGTH = 600


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return tokenizer_of(load_tokenizer(checkpoint))


def filler(tokens: int = LENGTH + CUE + COPIED + 5) -> np.ndarray:
    """Tokens that all differ from those of needles, so that what was overwritten shows: ids from 1,000 up."""
    return np.concatenate([[0], np.arange(1000, 999 + tokens)])


def cases(tokenizer: Tokenizer, probe: str, count: int = 2, seed: int = 0) -> list[Case]:
    return list(needle_cases(Grid((probe,), (LENGTH,), DEPTHS, count, seed), [filler()], tokenizer.tokenizer))


@pytest.mark.parametrize("probe", PUZZLES)
def test_the_answer_stands_at_the_distance(tokenizer: Tokenizer, probe: str) -> None:
    for case in cases(tokenizer, probe):
        answer = case.tokens[case.answer :]
        evidence = case.answer - case.distance

        np.testing.assert_array_equal(case.tokens[evidence : evidence + len(answer)], answer)
        assert not np.array_equal(case.without[evidence : evidence + len(answer)], answer)
        assert len(case.tokens) == len(case.without) == case.length == LENGTH


@pytest.mark.parametrize("probe", PUZZLES)
def test_without_the_answer_its_needle_alone_is_filler(tokenizer: Tokenizer, probe: str) -> None:
    for case in cases(tokenizer, probe):
        (changed,) = np.nonzero(case.tokens != case.without)

        assert changed[0] <= case.evidence <= changed[-1]
        np.testing.assert_array_equal(changed, np.arange(changed[0], changed[-1] + 1))  # one needle, nothing beside it
        np.testing.assert_array_equal(case.without[changed], filler()[changed])
        assert case.tokens[0] == 0
        np.testing.assert_array_equal(case.tokens[case.answer :], case.without[case.answer :])


@pytest.mark.parametrize("probe", ["passkey", "copying"])
def test_depths_go_from_the_first_token_to_the_question(tokenizer: Tokenizer, probe: str) -> None:
    of_one = cases(tokenizer, probe, 1)
    needles = [np.nonzero(case.tokens != case.without)[0] for case in of_one]
    question = int(np.nonzero(of_one[0].without != filler()[:LENGTH])[0][0])
    first, last = 1, question - len(needles[0])

    assert [case.depth for case in of_one] == list(DEPTHS)
    assert [needle[0] for needle in needles] == [first + round(depth * (last - first)) for depth in DEPTHS]
    assert needles[-1][-1] + 1 == question


def test_a_passkey_by_its_text(tokenizer: Tokenizer) -> None:
    case = cases(tokenizer, "passkey", 1)[2]
    answer = tokenizer.text(case.tokens[case.answer :])
    needle = tokenizer.text(case.tokens[case.tokens != case.without])

    assert answer[0] == " "
    assert answer[1:].isdigit()
    assert len(answer) == 6
    assert needle == f"\nThe pass key is{answer}\n"
    end = case.tokens[case.without != filler()[:LENGTH]]
    assert tokenizer.text(end) == f"\nThe pass key is{answer}"


@pytest.mark.parametrize("depth", DEPTHS)
def test_keys_by_their_text(tokenizer: Tokenizer, depth: float) -> None:
    case = next(case for case in cases(tokenizer, "keys", 1) if case.depth == depth)
    inserted = tokenizer.text(case.tokens[case.tokens != filler()[:LENGTH]])
    *pairs, question = [line for line in inserted.split("\n") if line]
    values = dict(pair.split(" = ") for pair in pairs)
    asked, answer = question.split(" = ")

    assert len(values) == KEYS
    assert len(set(values.values())) == KEYS
    assert values[asked] == answer
    assert list(values).index(asked) == round(depth * (KEYS - 1))


@pytest.mark.parametrize(("probe", "rank"), [("first-definition", 0), ("last-definition", 1)])
def test_two_definitions_by_their_text(tokenizer: Tokenizer, probe: str, rank: int) -> None:
    for case in cases(tokenizer, probe):
        inserted = tokenizer.text(case.tokens[case.tokens != filler()[:LENGTH]])
        *definitions, question = [line.split(" = ") for line in inserted.split("\n") if line]

        assert len({name for name, _ in (*definitions, question)}) == 1
        assert definitions[rank][1] == question[1]
        assert definitions[1 - rank][1] != question[1]


def test_needles_are_cut_as_the_tokenizer_cuts_their_text(tokenizer: Tokenizer) -> None:
    for probe in ("passkey", "keys", "last-definition"):
        puzzle = PUZZLES[probe](Material(tokenizer.tokenizer, 3, 1, 0.5, filler()))
        for ids in (puzzle.asked, np.concatenate([puzzle.question, puzzle.answer])):
            assert tokenizer.tokenizer.encode(tokenizer.text(ids), add_special_tokens=False).ids == ids.tolist()


def test_copied_tokens_come_from_beyond_every_filler(tokenizer: Tokenizer) -> None:
    for case in cases(tokenizer, "copying", 8):
        passage = case.tokens[case.answer - CUE :]

        assert len(passage) == CUE + COPIED
        assert passage.min() >= filler()[LENGTH]
        np.testing.assert_array_equal(passage, np.arange(passage[0], passage[0] + len(passage)))


def test_cases_depend_on_seed_and_number_alone(tokenizer: Tokenizer) -> None:
    def answers(grid: Grid) -> list[str]:
        made = needle_cases(grid, [filler()], tokenizer.tokenizer)
        return [tokenizer.text(case.tokens[case.answer :]) for case in made]

    short, long = Grid(("passkey",), (300,), (0.0, 1.0), 2), Grid(("passkey",), (300, 600), (0.5,), 3)

    a, b = answers(short), answers(long)
    assert a == [a[0], a[0], a[2], a[2]]
    assert b == [a[0], a[2], b[2]] * 2
    assert len({a[0], a[2], b[2]}) == 3
    assert answers(Grid(("passkey",), (300,), (0.0, 1.0), 2, seed=1)) != a


def test_what_does_not_fit_is_left_out_with_a_note(tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]) -> None:
    need = PUZZLES["copying"](Material(tokenizer.tokenizer, 0, 0, 0.0, filler())).shortest
    assert need == 1 + 2 * (CUE + COPIED)

    grid, skipped = Grid(("copying",), (need - 1, need), (0.0, 1.0), 1), list[int]()
    made = list(needle_cases(grid, [filler()], tokenizer.tokenizer, skipped.append))

    assert [case.length for case in made] == [need, need]
    assert [case.distance for case in made] == [CUE + COPIED] * 2
    assert sum(skipped) + sum(2 * len(case.tokens) for case in made) == grid.tokens
    assert f"copying takes {need} tokens: it is left out of texts of {need - 1}" in capfd.readouterr().err


def test_documents_take_turns(tokenizer: Tokenizer) -> None:
    made = needle_cases(Grid(("passkey",), (300,), (0.5,), 5), [filler(), filler()], tokenizer.tokenizer)

    assert [case.document for case in made] == [0, 1, 0, 1, 0]


def test_needles_before_and_after_leave_equal_gaps(tokenizer: Tokenizer) -> None:
    puzzle = PUZZLES["last-definition"](Material(tokenizer.tokenizer, 0, 0, 1.0, filler()))
    case = place("last-definition", puzzle, filler()[:LENGTH], 1.0)
    (first,) = puzzle.before
    asked = case.evidence - puzzle.offset
    begin = 1 + (asked - 1 - len(first)) // 2

    np.testing.assert_array_equal(case.tokens[begin : begin + len(first)], first)


@pytest.mark.parametrize("depths", [(), (-0.1, 0.5), (0.5, 1.01), (0.5, 0.5), (1.0, 0.0)])
def test_depths_out_of_range(depths: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^`depths` .*: expected rising percentages from 0 to 100"):
        Grid(("passkey",), (300,), depths)


def test_a_probe_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"^unknown probe 'passkeys'; did you mean 'passkey'\?"):
        Grid(("passkeys",), (300,))
