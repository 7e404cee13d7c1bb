"""Cases of real code: which names are asked for, and that only their definition differs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from expe_edge.quality.definitions import Reference, definition_cases, read_code, references
from expe_edge.quality.losses import Panel
from expe_edge.quality.needles import Case
from expe_edge.quality.recall import recall
from expe_edge.quality.scoring import Scorer
from expe_edge.text.documents import Document
from expe_edge.text.tokenization import encode_documents, load_tokenizer
from tests.quality.oracles import Tokenizer, tokenizer_of

CODE = '''"""Of helper no word."""

LIMIT = 10
width = 3


def tally(items):
    return sum(items)


# tally is in a comment first

class Helper:
    limit = width


def helping(tally):
    """LIMIT is in a text first."""
    return Helper(LIMIT), tally

async def later(again):
    return later


def never():
    same = 1
    return same


alone = alone
'''


HEAD = "# The old bright stone."


def module(number: int, gap: int) -> str:
    """A module whose function is referred to after `gap` lines, and names that others may be renamed to."""
    name = f"tree{number}"
    lines = [f"old{index} = the.river" for index in range(gap)]
    return "\n".join(
        [
            HEAD,
            f"def {name}(stone):",
            "    return stone",
            *lines,
            f"bright = {name}(under)",
            f"over = bright + {name}",
            "",
        ]
    )


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return tokenizer_of(load_tokenizer(checkpoint))


@pytest.fixture(scope="module")
def documents(tokenizer: Tokenizer) -> list[np.ndarray]:
    """Of rising gaps between the definition and the first reference; the last has a name of more tokens than others."""
    texts = [Document("m", module(number, gap)) for number, gap in enumerate((1, 2, 10, 20, 40))]
    texts.append(Document("m", module(5, 3).replace("tree", "quizzically")))
    return [ids.astype(np.int64) for ids in encode_documents(tokenizer.tokenizer, texts)]


def test_names_that_are_next_mentioned_in_code() -> None:
    assert list(references(CODE)) == [
        Reference("width", CODE.index("width"), CODE.index("width\n\n\ndef helping")),
        Reference("Helper", CODE.index("Helper"), CODE.index("Helper(LIMIT)")),
        Reference("later", CODE.index("later(again)"), CODE.index("later\n\n\ndef never")),
    ]


@pytest.mark.parametrize("text", ["name = 1\nprint('", "  name\n name = 1\n\tname(\n", "the name = of the rose\n" * 5])
def test_text_that_is_no_python_has_no_names(text: str) -> None:
    assert list(references(text)) == []


def test_tokens_of_characters(tokenizer: Tokenizer, documents: list[np.ndarray]) -> None:
    for ids in documents:
        code = read_code(tokenizer.tokenizer, ids)
        assert code is not None
        assert code.text == tokenizer.text(ids[1:])
        for reference in references(code.text):
            begin, end = code.tokens_of(reference.mentioned, reference.mentioned + len(reference.name))
            assert tokenizer.text(ids[begin:end]).strip(" (=") == reference.name
            assert tokenizer.text(ids[1:begin]) == code.text[: len(tokenizer.text(ids[1:begin]))]


def tree_cases(documents: list[np.ndarray], tokenizer: Tokenizer, lengths: tuple[int, ...], count: int) -> list[Case]:
    return [
        case
        for case in definition_cases(documents, tokenizer.tokenizer, lengths, count, 0)
        if "tree" in tokenizer.text(case.tokens[case.answer :])
    ]


def test_only_the_definition_is_another(documents: list[np.ndarray], tokenizer: Tokenizer) -> None:
    lengths = (64, 128, 2000)
    made = tree_cases(documents, tokenizer, lengths, 100)

    assert len(made) == 5
    for case in made:
        text, without = (tokenizer.text(ids) for ids in (case.tokens[1:], case.without[1:]))
        name = f"tree{case.document}"
        assert text.endswith(f"bright = {name}")
        assert text.startswith(f"{HEAD}\ndef {name}(")
        assert without.startswith(f"{HEAD}\ndef ")
        assert not without.startswith(f"{HEAD}\ndef {name}(")
        assert without.split("(", 1)[1] == text.split("(", 1)[1]
        assert name not in without.removesuffix(name)
        assert len(case.tokens) == len(case.without)
        np.testing.assert_array_equal(case.tokens, documents[case.document][: len(case.tokens)])


def test_distances_are_counted_in_tokens(documents: list[np.ndarray], tokenizer: Tokenizer) -> None:
    lengths = (64, 128, 2000)
    for case in tree_cases(documents, tokenizer, lengths, 100):
        between = tokenizer.text(case.tokens[case.evidence : case.answer])

        assert between.strip().startswith(f"tree{case.document}(")
        assert between.endswith("bright =")
        assert tokenizer.text(case.tokens[case.answer :]) == f" tree{case.document}"
        assert case.length == min(length for length in lengths if length >= case.distance)


def test_a_text_begins_so_far_back_as_the_longest_length(documents: list[np.ndarray], tokenizer: Tokenizer) -> None:
    whole = {case.document: case for case in tree_cases(documents, tokenizer, (2000,), 100)}
    reach = len(whole[2].tokens) - 1  # one token less than document 2 has

    cut = {case.document: case for case in tree_cases(documents, tokenizer, (reach,), 100)}

    assert sorted(cut) == [0, 1, 2]  # beyond, the definition is out of sight
    assert len(cut[2].tokens) == reach
    assert cut[2].tokens[0] == 0
    np.testing.assert_array_equal(cut[2].tokens[1:], whole[2].tokens[2:])
    assert cut[2].distance == whole[2].distance


def test_so_many_cases_as_asked_for_and_the_same_again(documents: list[np.ndarray], tokenizer: Tokenizer) -> None:
    def chosen(count: int, seed: int) -> list[tuple[int, int, int]]:
        made = definition_cases(documents, tokenizer.tokenizer, (64, 2000), count, seed)
        return [(case.length, case.document, case.answer) for case in made]

    assert [length for length, _, _ in chosen(2, 0)] == [64, 64, 2000, 2000]
    assert chosen(2, 0) == chosen(2, 0)
    assert len({tuple(chosen(2, seed)) for seed in range(8)}) > 1


def test_a_trained_model_takes_them(scorers: list[Scorer], documents: list[np.ndarray], tokenizer: Tokenizer) -> None:
    made = definition_cases(documents, tokenizer.tokenizer, (128, 2000), 2, 0)

    results = recall(Panel(scorers[:2]), made)

    assert [(r.model, r.length, r.depth, r.cases) for r in results] == [
        (model, length, None, 2) for model in ("model", "float32") for length in (128, 2000)
    ]
    assert all(np.isfinite(r.gained) and r.loss > 0 for r in results)


def test_no_other_name_no_case(tokenizer: Tokenizer) -> None:
    (ids,) = encode_documents(tokenizer.tokenizer, [Document("m", "def tree(stone):\n    return 1\n\n\ntree(2)\n")])

    assert definition_cases([ids.astype(np.int64)], tokenizer.tokenizer, (2000,), 5, 0) == []
