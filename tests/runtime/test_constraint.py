"""Constrained text: whatever is sampled, however hot, it is what was asked for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from expe_edge.errors import GenerationError
from expe_edge.runtime import Constraint, Generator, Sampling
from expe_edge.runtime.constraint import Vocabulary
from expe_edge.text.documents import Document
from expe_edge.text.tokenization import train_tokenizer
from tests.runtime.test_generator import refusal

HOT = 50.0
VOCABULARIES = (257, 300)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog", None, 3]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@cache
def vocabulary_of(vocab_size: int) -> tuple[Vocabulary, Any]:
    """Plain bytes, or BPE, as llguidance reads them; and the tokenizer."""
    tokenizer = train_tokenizer(
        [Document("sample", 'The old tree. {"a": 1, "b": [true]} naïve 日本 😀 ' * 8)], vocab_size
    )
    return Vocabulary(tokenizer, vocab_size, 0), tokenizer


def random_text(constraint: Constraint, vocab_size: int, seed: int, most: int = 400) -> str | None:
    """A text of tokens drawn evenly from all that are allowed, until it ends; None where it does not within `most`."""
    vocabulary, tokenizer = vocabulary_of(vocab_size)
    matcher, random, tokens = vocabulary.matcher(constraint), np.random.default_rng(seed), list[int]()
    while not matcher.complete:
        if len(tokens) == most:
            return None
        token = int(random.choice(matcher.allowed()))
        if token == 0:
            break
        matcher.accept(token)
        tokens.append(token)
    text: str = tokenizer.decode(tokens)
    return text


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@given(seed=st.integers(0, 2**16))
@pytest.mark.parametrize(
    "regex",
    [
        r"[0-9]{3}-[0-9]{4}",
        r"(yes|no|maybe)!?",
        r"[a-z]+(/[a-z]+){1,3}\.py",
        r'"[^"\\]{0,9}"',
        r"(é|日本|😀|tree ){1,6}",
    ],
)
def test_random_texts_match_the_expression(regex: str, vocab_size: int, seed: int) -> None:
    text = random_text(Constraint(regex=regex), vocab_size, seed)

    assert text is None or re.fullmatch(regex, text), text


def is_person(value: Any) -> bool:
    """Whether a value is what `PERSON` says, by hand."""
    return (
        isinstance(value, dict)
        and {"name", "age", "kind"} <= value.keys() <= PERSON["properties"].keys()  # type: ignore[attr-defined]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 8
        and type(value["age"]) is int
        and 0 <= value["age"] <= 120
        and any(value["kind"] is one or value["kind"] == one for one in ("cat", "dog", None, 3))
        and len(value.get("tags", [])) <= 3
        and all(isinstance(tag, bool) for tag in value.get("tags", []))
    )


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@given(seed=st.integers(0, 2**16))
def test_random_texts_are_valid_by_the_schema(vocab_size: int, seed: int) -> None:
    text = random_text(Constraint(json_schema=PERSON), vocab_size, seed)

    assert text is not None
    assert is_person(json.loads(text)), text


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@given(choices=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=4), seed=st.integers(0, 99))
@example(choices=['"', "\\", "\n\t", "/", "😀", "a", "ab", "\x00"], seed=0)
@example(choices=["<|endoftext|>"], seed=0)
@example(choices=["\x7f\x85\u2028"], seed=0)
def test_random_texts_are_one_of_the_choices(vocab_size: int, choices: list[str], seed: int) -> None:
    assert random_text(Constraint(choices=choices), vocab_size, seed) in choices


@given(seed=st.integers(0, 2**16))
def test_random_texts_are_of_the_grammar(seed: int) -> None:
    """Balanced brackets, which no regular expression can ask for."""
    text = random_text(Constraint(grammar='start: pair+\npair: "(" pair* ")" | "[" pair* "]"'), 257, seed)
    assert text is None or text
    while text and text != (shorter := text.replace("()", "").replace("[]", "")):
        text = shorter
    assert not text


# With a model


@pytest.mark.parametrize("seed", range(3))
def test_hot_samples_of_every_package_match(any_generator: Generator, seed: int) -> None:
    sampling = Sampling(temperature=HOT, seed=seed)

    found = any_generator.generate(
        ["the", "a"], n=2, constraint=Constraint(regex=r"[a-f]{2,5}=[0-9]{1,9};"), sampling=sampling
    )
    whole = any_generator.generate(["the"], constraint=Constraint(json_schema=PERSON), sampling=sampling)[0]

    for each in found:
        assert re.fullmatch(r"[a-f]{2,5}=[0-9]{1,9};", each.text)
        assert each.finish_reason == "constraint"
    assert is_person(json.loads(whole.text))
    assert whole.finish_reason == "constraint"


def test_the_reference_model_writes_what_it_is_told_to() -> None:
    generator = Generator.load(threads=1)

    for seed in range(3):
        sampling = Sampling(temperature=HOT, seed=seed)
        person = generator.generate(["def main("], constraint=Constraint(json_schema=PERSON), sampling=sampling)[0]
        assert is_person(json.loads(person.text))
    (name,) = generator.generate(["import "], constraint=Constraint(choices=["os", "sys", "json"]))
    assert name.text in ("os", "sys", "json")
    (greedy,) = generator.generate(["def f(a, b):\n    return a"], constraint=Constraint(regex=r" [+*] b\n"))
    assert greedy.text in (" + b\n", " * b\n")


def test_greedy_choices_are_the_likeliest_of_those_allowed(generator: Generator) -> None:
    (free,) = generator.generate(["the"], max_new_tokens=12)
    (same,) = generator.generate(["the"], max_new_tokens=12, constraint=Constraint(regex=r"[\s\S]*"))
    (digits,) = generator.generate(["the"], max_new_tokens=1, logprobs=300, constraint=Constraint(regex=r"[0-9]+"))

    assert same.tokens == free.tokens
    assert digits.logprobs is not None
    assert digits.tokens[0] == next(each.token for each in digits.logprobs[0].top if each.text.isdigit())


def test_text_may_end_by_itself_where_the_grammar_allows(generator: Generator) -> None:
    ends = set()
    for seed in range(8):
        sampling = Sampling(temperature=HOT, seed=seed, logit_bias={0: 60.0})
        (found,) = generator.generate(["the"], constraint=Constraint(regex="a+"), sampling=sampling)
        assert re.fullmatch("a+", found.text)
        ends.add(found.finish_reason)
    assert ends == {"end_of_text"}


def test_length_ends_a_text_that_is_not_complete(generator: Generator) -> None:
    (found,) = generator.generate(["the"], max_new_tokens=4, constraint=Constraint(regex="[0-9]{9}"))

    assert re.fullmatch("[0-9]{4}", found.text)
    assert found.finish_reason == "length"


def test_pieces_of_a_constrained_stream(generator: Generator) -> None:
    constraint = Constraint(json_schema={"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3})
    pieces = list(generator.stream("the", constraint=constraint, sampling=Sampling(temperature=HOT, seed=2)))

    assert len(json.loads("".join(pieces))) in (2, 3)
    assert re.fullmatch(r"\[-?\d+, -?\d+(, -?\d+)?\]", "".join(pieces))


def test_schema_as_text_and_as_values_is_the_same() -> None:
    assert Constraint(json_schema=json.dumps(PERSON)) == Constraint(json_schema=PERSON)


def test_schema_that_all_json_meets() -> None:
    for seed in range(10):
        text = random_text(Constraint(json_schema=True), 257, seed, most=4000)
        assert text is None or json.loads(text) is not ...


# Refusals


@pytest.mark.parametrize(
    ("given", "what"),
    [({}, "nothing"), ({"regex": "a", "choices": ["b"]}, "`regex` and `choices`"), ({"choices": []}, "nothing")],
    ids=str,
)
def test_one_constraint_and_no_more(given: dict[str, Any], what: str) -> None:
    with pytest.raises(GenerationError) as caught:
        Constraint(**given)

    assert str(caught.value) == (
        f"a constraint is one of `json_schema`, `regex`, `grammar` and `choices`; given: {what}"
    )


@pytest.mark.parametrize(
    ("given", "beginning"),
    [
        ({"regex": "("}, "`regex`: "),
        ({"regex": r"a[^\s\S]"}, "`regex`: no text of this vocabulary can meet it from here on"),
        ({"grammar": "start: missing"}, '`grammar`: at 1(8): unknown name: "missing"'),
        ({"grammar": ""}, "`grammar`: "),
        ({"json_schema": {"const": 10**400}}, "`json_schema`: number out of range"),
        ({"json_schema": False}, "`json_schema`: "),
        ({"json_schema": {"type": "color"}}, "`json_schema`: Invalid type: color"),
        ({"json_schema": {"type": "integer", "minimum": 3, "maximum": 2}}, "`json_schema`: Unsatisfiable schema"),
    ],
    ids=str,
)
def test_constraint_that_cannot_be_met(generator: Generator, given: dict[str, Any], beginning: str) -> None:
    assert refusal(generator.stream, "the", constraint=Constraint(**given)).startswith(beginning)
    assert refusal(generator.generate, ["the"], constraint=Constraint(**given)).startswith(beginning)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "`json_schema` is no JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        ("[1]", "`json_schema` must be an object, true or false"),
        ('{"const": 1e999}', "`json_schema` is no JSON (Out of range float values are not JSON compliant)"),
        ("3", "`json_schema` must be an object, true or false"),
        ({"a": {1}}, "`json_schema` is no JSON (Object of type set is not JSON serializable)"),
    ],
    ids=str,
)
def test_schema_that_is_none(schema: Any, message: str) -> None:
    with pytest.raises(GenerationError) as caught:
        Constraint(json_schema=schema)

    assert str(caught.value) == message


@pytest.mark.parametrize("choices", ["yes", ["yes", ""]])
def test_choices_that_are_none(choices: Any) -> None:
    with pytest.raises(GenerationError) as caught:
        Constraint(choices=choices)

    assert str(caught.value) == "`choices` must be texts of one character or more"


@pytest.mark.parametrize(
    "given", [{"regex": "a\ud800"}, {"grammar": "\ud800"}, {"choices": ["a", "\udfff"]}], ids=ascii
)
def test_constraint_that_is_no_text(given: dict[str, Any]) -> None:
    with pytest.raises(GenerationError) as caught:
        Constraint(**given)

    assert str(caught.value) == f"`{next(iter(given))}` holds half a surrogate pair, which is no text"


def test_constraint_and_least_length(generator: Generator) -> None:
    assert refusal(generator.stream, "the", min_new_tokens=2, constraint=Constraint(regex="a")) == (
        "`min_new_tokens` and a constraint are both given, which says itself when the text may end; use one"
    )


def test_without_llguidance_one_line_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['llguidance'] = None\n"
        "from expe_edge.runtime import Constraint, Generator\n"
        "generator = Generator.load(threads=1)\n"
        "assert generator.generate(['import'], max_new_tokens=2)\n"
        "generator.generate(['import'], constraint=Constraint(regex='a'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.stderr.splitlines()[-1] == (
        "expe_edge.errors.GenerationError: a constraint needs llguidance, which is not installed; "
        "pip install 'expe-edge[constrained]'"
    )
