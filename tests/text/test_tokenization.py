"""Tokens: whatever goes in comes out, and every token knows how many bytes it stands for."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from expe_edge.errors import CheckpointError, ConfigError
from expe_edge.text.corpus import load_corpus
from expe_edge.text.documents import Document
from expe_edge.text.tokenization import (
    BYTE_VOCABULARY,
    END_OF_TEXT,
    LONGEST_WORD,
    bounded_words,
    encode_documents,
    load_tokenizer,
    token_byte_lengths,
    train_tokenizer,
)

#: Plain bytes, and byte-level BPE with merges inside words and inside characters.
VOCABULARIES = (BYTE_VOCABULARY, 270, 330)
SAMPLE = "The quick brown fox jumps over the lazy dog. Ελληνικά, 日本語, עברית, 😀😀 naïve café. " * 8
#: Any text that UTF-8 can write, the separator's name among it.
UNICODE = st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=3).map(END_OF_TEXT.join)


@cache
def tokenizer_of(vocab_size: int) -> Tokenizer:
    """A tokenizer trained on the sample."""
    return train_tokenizer([Document("sample", SAMPLE)], vocab_size)


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids of one document, (T,) int32."""
    (ids,) = encode_documents(tokenizer, [Document("text", text)])
    return ids


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_vocabulary_has_the_size_asked_for(vocab_size: int) -> None:
    assert tokenizer_of(vocab_size).get_vocab_size() == vocab_size


def test_tokenizer_of_other_ids_or_another_vocabulary_is_refused(tmp_path: Path) -> None:
    """Ids are columns of the logits and rows of tables: they are 0, 1, 2, …, as many as the model has."""
    good = tokenizer_of(270)
    values = json.loads(good.to_str())
    last = max(values["model"]["vocab"], key=values["model"]["vocab"].__getitem__)
    values["model"]["vocab"][last] = 10**6
    merged = json.dumps(values)
    plain = good.to_str().replace(END_OF_TEXT, "<|other|>")

    refusals = {
        merged: r"\.json: not a tokenizer \(the ids of its 270 tokens are not those from 0 to 269\)$",
        plain: r"\.json: not a tokenizer of train: no <\|endoftext\|>$",
    }
    for text, refusal in refusals.items():
        (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match=refusal):
            load_tokenizer(tmp_path)
    good.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path, 270).get_vocab_size() == 270
    with pytest.raises(CheckpointError, match=r"the tokenizer has 270 tokens, the model's vocabulary 300; they do not"):
        load_tokenizer(tmp_path, 300)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@given(text=UNICODE)
def test_any_text_comes_back(vocab_size: int, text: str) -> None:
    tokenizer = tokenizer_of(vocab_size)

    assert tokenizer.decode(list(encode(tokenizer, text)), skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@given(text=UNICODE)
def test_byte_lengths_add_up_to_the_text(vocab_size: int, text: str) -> None:
    tokenizer = tokenizer_of(vocab_size)

    assert token_byte_lengths(tokenizer)[encode(tokenizer, text)].sum() == len(text.encode())


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@given(text=UNICODE)
def test_separator_comes_first_and_nowhere_else(vocab_size: int, text: str) -> None:
    tokenizer = tokenizer_of(vocab_size)
    ids = encode(tokenizer, text)

    assert ids.dtype == np.int32
    assert ids[0] == 0
    assert (ids[1:] > 0).all()
    assert (ids < vocab_size).all()
    assert list(ids) == tokenizer.encode(text).ids  # a prompt opens as documents do


@given(text=UNICODE)
def test_257_tokens_are_plain_bytes(text: str) -> None:
    tokenizer = tokenizer_of(BYTE_VOCABULARY)

    assert len(encode(tokenizer, text)) == 1 + len(text.encode())


def test_every_byte_has_one_token_of_one_byte() -> None:
    lengths = token_byte_lengths(tokenizer_of(BYTE_VOCABULARY))

    assert lengths.dtype == np.int64
    assert list(lengths) == [0] + [1] * 256


@pytest.mark.parametrize("vocab_size", [270, 330])
def test_merges_shorten_the_text_they_were_trained_on(vocab_size: int) -> None:
    tokenizer = tokenizer_of(vocab_size)

    assert len(encode(tokenizer, SAMPLE)) < 0.9 * len(SAMPLE.encode())
    assert token_byte_lengths(tokenizer).max() > 1


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_separator_is_token_0_and_no_text(vocab_size: int) -> None:
    tokenizer = tokenizer_of(vocab_size)

    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    assert token_byte_lengths(tokenizer)[0] == 0
    assert tokenizer.decode([0], skip_special_tokens=False) == END_OF_TEXT


def test_the_name_of_the_separator_is_text_like_any_other(tmp_path: Path) -> None:
    tokenizer_of(330).save(str(tmp_path / "tokenizer.json"))

    for tokenizer in (tokenizer_of(330), load_tokenizer(tmp_path)):
        ids = encode(tokenizer, f"a{END_OF_TEXT}b")
        assert list(ids[1:]).count(0) == 0
        assert tokenizer.decode(list(ids)) == f"a{END_OF_TEXT}b"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("語" * 600, ["語" * LONGEST_WORD, "語" * LONGEST_WORD, "語" * (600 - 2 * LONGEST_WORD)]),
        ("=" * 257, ["=" * LONGEST_WORD, "="]),
        (" " * 257, [" " * LONGEST_WORD, " "]),
        ("a" * LONGEST_WORD + "=" * LONGEST_WORD + "b", ["a" * LONGEST_WORD + "=" * LONGEST_WORD + "b"]),
        (SAMPLE * 10, [SAMPLE * 10]),
    ],
    ids=["letters", "signs", "spaces", "both", "words"],
)
def test_words_that_a_tokenizer_is_trained_on_are_bounded(text: str, expected: list[str]) -> None:
    assert bounded_words(text).split("\n") == expected


def test_failures_of_the_trainer_are_raised() -> None:
    with pytest.raises(TypeError):
        train_tokenizer([Document("a", SAMPLE)], 300.5)  # type: ignore[arg-type]  # a number of tokens is whole


def test_documents_are_encoded_in_order() -> None:
    tokenizer = tokenizer_of(330)
    documents = [Document("a", SAMPLE), Document("b", "short"), Document("c", "")]

    encoded = encode_documents(tokenizer, documents)

    assert [tokenizer.decode(list(ids)) for ids in encoded] == [SAMPLE, "short", ""]


def test_training_is_repeatable(text_folder: Path) -> None:
    documents = load_corpus([str(text_folder)]).training

    assert train_tokenizer(documents, 320).to_str() == train_tokenizer(documents, 320).to_str()


@pytest.mark.parametrize("vocab_size", [256, 1, 0, -5])
def test_vocabulary_without_room_for_the_bytes_is_refused(vocab_size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        train_tokenizer([Document("sample", SAMPLE)], vocab_size)

    assert str(caught.value) == f"vocab_size is {vocab_size}; at least 257: 256 bytes and <|endoftext|>"


def test_tokenizer_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)

    assert str(caught.value) == f"{tmp_path}: no tokenizer.json in it"


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "\x00"])
def test_tokenizer_that_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")

    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)

    assert str(caught.value).startswith(f"{tmp_path}/tokenizer.json: not a tokenizer (")
    assert "\n" not in str(caught.value)


def test_tokenizer_survives_its_file(tmp_path: Path) -> None:
    tokenizer_of(330).save(str(tmp_path / "tokenizer.json"))

    assert load_tokenizer(tmp_path).to_str() == tokenizer_of(330).to_str()
