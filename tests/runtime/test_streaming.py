"""Streamed text: never half a character, never part of a stop string, nothing lost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from expe_edge.runtime.streaming import TextStream
from expe_edge.text.documents import Document
from expe_edge.text.tokenization import END_OF_TEXT, train_tokenizer

SAMPLE = "The old tree grows over the river. 日本語 😀😀 naïve café. " * 8
#: Plain bytes, where every character beyond ASCII is split; and BPE, where some are.
VOCABULARIES = (257, 300)
#: Characters of one to four bytes, joined emoji and combining marks included, with ASCII often enough to mix.
TEXT = st.text(st.sampled_from("ab e\u0301éß€日本😀\u200d👩🏽🚀") | st.characters(exclude_categories=["Cs"]))


@cache
def tokenizer_of(vocab_size: int) -> Tokenizer:
    """A tokenizer trained on the sample."""
    return train_tokenizer([Document("sample", SAMPLE)], vocab_size)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of `text`, without the separator."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def stream(tokenizer: Tokenizer, tokens: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], str, bool]:
    """Push tokens until a stop string is met; return the pieces, the rest, and whether one was."""
    text, pieces = TextStream(tokenizer, stop), []
    for token in tokens:
        pieces.append(text.push(token))
        if text.stopped:
            break
    return pieces, text.finish(), text.stopped


def cut_at_first_stop(tokenizer: Tokenizer, tokens: Sequence[int], stop: Sequence[str]) -> str:
    """What streaming must give: as soon as the text so far holds a stop string, the text before it; else all of it."""
    for count in range(1, len(tokens) + 1):
        whole: str = tokenizer.decode(tokens[:count])
        found = [whole.find(text) for text in stop if text in whole]
        if found:
            return whole[: min(found)]
    everything: str = tokenizer.decode(tokens)
    return everything


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@given(text=TEXT)
@example(text="😀")
@example(text="naïve 👩🏽\u200d🚀 café")
@example(text="\ufffd")
def test_pieces_are_whole_characters_and_join_to_the_text(vocab_size: int, text: str) -> None:
    tokenizer = tokenizer_of(vocab_size)
    pieces, rest, _ = stream(tokenizer, encode(tokenizer, text))

    joined = ""
    for piece in pieces:
        joined += piece
        assert text.startswith(joined)  # so a replacement character stands only where the text has one
    assert joined + rest == text
    assert text.endswith("\ufffd") or rest == ""  # a finished character is not held back


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@given(data=st.data())
def test_any_tokens_join_to_what_the_tokenizer_decodes(vocab_size: int, data: st.DataObject) -> None:
    """A model may choose any bytes, so also such as are no UTF-8, and the separator among them."""
    tokenizer = tokenizer_of(vocab_size)
    common = [0, *encode(tokenizer, "é€😀a")]
    tokens = data.draw(st.lists(st.sampled_from(common) | st.integers(0, vocab_size - 1), max_size=24))

    pieces, rest, _ = stream(tokenizer, tokens)

    assert "".join(pieces) + rest == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("text", ["é", "€", "😀", "a😀b", "👩🏽\u200d🚀"])
def test_character_appears_with_its_last_byte(text: str) -> None:
    tokenizer = tokenizer_of(257)

    pieces, rest, _ = stream(tokenizer, encode(tokenizer, text))

    expected = [piece for character in text for piece in [""] * (len(character.encode()) - 1) + [character]]
    assert pieces == expected
    assert rest == ""


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_unfinished_character_is_given_at_the_end(kept: int) -> None:
    tokenizer = tokenizer_of(257)
    tokens = encode(tokenizer, "ab😀")[: 2 + kept]

    pieces, rest, _ = stream(tokenizer, tokens)

    assert "".join(pieces) == "ab"
    assert rest == "\ufffd"


def test_separator_gives_no_text() -> None:
    tokenizer = tokenizer_of(257)

    pieces, rest, _ = stream(tokenizer, [0, *encode(tokenizer, "a"), tokenizer.token_to_id(END_OF_TEXT)])

    assert pieces == ["", "a", ""]
    assert rest == ""


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one STOP two", ["STOP"], "one "),
        ("STOP", ["STOP"], ""),
        ("one two", ["STOP"], "one two"),
        ("a\n\nb\n\nc", ["\n\n"], "a"),
        ("ababac", ["abac"], "ab"),
        ("aaab", ["aab"], "a"),
        ("naïve café", ["é"], "naïve caf"),
        ("ab😀😀cd", ["😀😀"], "ab"),
        ("ab😀cd", ["😀😀"], "ab😀cd"),
        ("the old river", ["river", "old"], "the "),
        ("the river", ["the river runs"], "the river"),
        ("x</s>", ["</s>", "<s>"], "x"),
        ("text", ["", "xt"], "te"),
        ("text", [""], "text"),
    ],
)
def test_text_ends_before_a_stop_string(vocab_size: int, text: str, stop: list[str], expected: str) -> None:
    tokenizer = tokenizer_of(vocab_size)

    pieces, rest, stopped = stream(tokenizer, encode(tokenizer, text), stop)

    assert "".join(pieces) + rest == expected
    assert stopped is any(string in text for string in stop if string)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@given(text=st.text("ab é😀", max_size=20), stop=st.lists(st.text("ab é😀", min_size=1, max_size=4), max_size=3))
def test_stop_strings_over_any_pieces(vocab_size: int, text: str, stop: list[str]) -> None:
    tokenizer = tokenizer_of(vocab_size)
    tokens = encode(tokenizer, text)
    expected = cut_at_first_stop(tokenizer, tokens, stop)

    pieces, rest, stopped = stream(tokenizer, tokens, stop)

    assert "".join(pieces) + rest == expected
    assert stopped is any(string in text for string in stop)
    assert not stopped or rest == ""
    joined = ""
    for piece in pieces:  # nothing is printed that a stop string then takes back
        joined += piece
        assert expected.startswith(joined)


@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=4))
def test_no_more_is_held_back_than_could_begin_the_stop_string(text: str, stop: str) -> None:
    tokenizer = tokenizer_of(257)
    held = TextStream(tokenizer, [stop])
    given_out = ""
    for count, token in enumerate(encode(tokenizer, text), 1):
        given_out += held.push(token)
        if held.stopped:
            return
        kept = text[len(given_out) : count]
        assert kept == "" or stop.startswith(kept)
        assert not any(stop.startswith(text[begin:count]) for begin in range(len(given_out)))


def test_what_looked_like_a_stop_string_is_given_at_the_end() -> None:
    tokenizer = tokenizer_of(257)

    pieces, rest, stopped = stream(tokenizer, encode(tokenizer, "the STO"), ["STOP"])

    assert "".join(pieces) == "the "
    assert rest == "STO"
    assert not stopped
