"""Cases of recall: needles at exact places of a filler text, whose end asks for what one of them says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from expe_edge.quality.scoring import Ids

#: Pairs of a key and its value in one text.
KEYS = 8
#: Tokens that are copied, and the tokens before them that say which.
COPIED = 32
CUE = 8
_CONSONANTS, _VOWELS = "bdfghklmnprstvz", "aeiou"


@dataclass(frozen=True, eq=False)
class Case:
    """One question to a model, with its answer standing in the text and without.

    tokens: the text (T,) with what the answer can be known from; it ends with the answer. without: the same text (T,)
    but for that. evidence: where in `tokens` it stands, its first token. answer: where the answer begins.
    length, depth: the cell that the case belongs to; see `place` for depth, which is None where no one chose it.
    document: index of the text that the case is made of.
    """

    probe: str
    document: int
    length: int
    depth: float | None
    tokens: Ids
    without: Ids
    evidence: int
    answer: int

    @property
    def distance(self) -> int:
        """Tokens from the evidence to the answer, first token to first token."""
        return self.answer - self.evidence


@dataclass(frozen=True, eq=False)
class Puzzle:
    """Needles and a question, all token ids.

    asked: the needle that holds the answer, from its token `offset` on. before, after: needles between the text's
    beginning and that, and between that and the question.
    """

    asked: Ids
    offset: int
    question: Ids
    answer: Ids
    before: tuple[Ids, ...] = ()
    after: tuple[Ids, ...] = ()

    @property
    def shortest(self) -> int:
        """Tokens of the shortest text that holds all of it, the opening separator included."""
        return 1 + sum(map(len, (*self.before, self.asked, *self.after, self.question, self.answer)))


@dataclass(frozen=True, eq=False)
class Material:
    """What a puzzle is made of.

    tokenizer: of the models. seed, case: all that numbers and names depend on. depth: where the asked needle is to
    stand, from 0 to 1. beyond: tokens of the filler's document that no filler reaches, at least `CUE` + `COPIED`.
    """

    tokenizer: Any
    seed: int
    case: int
    depth: float
    beyond: Ids

    def random(self) -> np.random.Generator:
        """A generator that always begins the same for a seed and a case."""
        return np.random.default_rng([self.seed, self.case])

    def encode(self, text: str) -> Ids:
        """Return the token ids of a piece of text."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def statement(self, subject: str, value: int) -> Ids:
        """Return a line that gives a value."""
        return np.concatenate([self.encode(f"\n{subject}"), self.encode(f" {value}"), self.encode("\n")])

    def puzzle(self, subject: str, value: int, before: Sequence[Ids] = (), after: Sequence[Ids] = ()) -> Puzzle:
        """Return the puzzle that states a value and asks for it by the same words.

        The pieces are encoded one by one, and end where the tokenizer splits text anyway: a space before a number.
        """
        question = self.encode(f"\n{subject}")
        asked, answer = self.statement(subject, value), self.encode(f" {value}")
        return Puzzle(asked, len(question), question, answer, tuple(before), tuple(after))


def _numbers(random: np.random.Generator, count: int) -> list[int]:
    """Draw different numbers of five digits."""
    return [10_000 + int(number) for number in random.choice(90_000, count, replace=False)]


def _names(random: np.random.Generator, count: int) -> list[str]:
    """Draw different names of four syllables."""
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = (random.choice(list(_CONSONANTS)) + random.choice(list(_VOWELS)) for _ in range(4))
        names["".join(syllables)] = None
    return list(names)


def passkey(material: Material) -> Puzzle:
    """A number in a sentence of its own."""
    return material.puzzle("The pass key is", _numbers(material.random(), 1)[0])


def keys(material: Material) -> Puzzle:
    """Several `key = value`, evenly spread; asked is the one at the depth."""
    random = material.random()
    pairs = [(f"{name} =", value) for name, value in zip(_names(random, KEYS), _numbers(random, KEYS), strict=True)]
    asked, *others = pairs
    rank = round(material.depth * len(others))
    statements = [material.statement(*pair) for pair in others]
    return material.puzzle(*asked, before=statements[:rank], after=statements[rank:])


def first_definition(material: Material) -> Puzzle:
    """A name defined twice; the first definition, at the depth, is the answer."""
    subject, first, last = _twice(material)
    return material.puzzle(subject, first, after=[material.statement(subject, last)])


def last_definition(material: Material) -> Puzzle:
    """A name defined twice; the last definition, at the depth, is the answer."""
    subject, first, last = _twice(material)
    return material.puzzle(subject, last, before=[material.statement(subject, first)])


def _twice(material: Material) -> tuple[str, int, int]:
    """Draw a name and its two values."""
    random = material.random()
    (name,), (first, last) = _names(random, 1), _numbers(random, 2)
    return f"{name} =", first, last


def copying(material: Material) -> Puzzle:
    """A passage of real text that stands in the filler; its first `CUE` tokens ask for the rest of it."""
    begin = int(material.random().integers(len(material.beyond) - CUE - COPIED + 1))
    passage = material.beyond[begin : begin + CUE + COPIED]
    return Puzzle(passage, CUE, passage[:CUE], passage[CUE:])


#: Every probe of recall in filler text.
PUZZLES: dict[str, Callable[[Material], Puzzle]] = {
    "passkey": passkey,
    "keys": keys,
    "first-definition": first_definition,
    "last-definition": last_definition,
    "copying": copying,
}


def place(probe: str, puzzle: Puzzle, filler: Ids, depth: float, document: int = 0) -> Case:
    """Put a puzzle into a filler text (T,), whose tokens give way to it, so that the text stays T tokens long.

    At depth 0 the asked needle stands as near to the beginning as what is before it allows, at depth 1 as near to the
    question. `filler` has at least `puzzle.shortest` tokens; its first, which opens the text, stays.
    """
    question = len(filler) - len(puzzle.question) - len(puzzle.answer)
    lowest = 1 + sum(map(len, puzzle.before))
    highest = question - sum(map(len, puzzle.after)) - len(puzzle.asked)
    begin = lowest + round(depth * (highest - lowest))
    end = begin + len(puzzle.asked)
    without = filler.copy()
    _spread(without[1:begin], puzzle.before)
    _spread(without[end:question], puzzle.after)
    without[question:] = np.concatenate([puzzle.question, puzzle.answer])
    tokens = without.copy()
    tokens[begin:end] = puzzle.asked
    answer = len(filler) - len(puzzle.answer)
    return Case(probe, document, len(filler), depth, tokens, without, begin + puzzle.offset, answer)


def _spread(text: Ids, needles: Sequence[Ids]) -> None:
    """Write needles into a text with equal gaps before, between and behind them."""
    free, written = len(text) - sum(map(len, needles)), 0
    for index, needle in enumerate(needles, start=1):
        begin = index * free // (len(needles) + 1) + written
        text[begin : begin + len(needle)] = needle
        written += len(needle)
