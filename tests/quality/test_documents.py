"""Which documents are scored."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from expe_edge.errors import CorpusError
from expe_edge.quality.comparison import (
    long_documents,
)
from expe_edge.quality.scoring import Scorer, open_scorer
from expe_edge.text.corpus import load_corpus
from expe_edge.text.documents import Document
from expe_edge.text.tokenization import encode_documents, load_tokenizer, token_byte_lengths


def test_documents_are_held_out_and_long_enough(scorers: list[Scorer], text_folder: Path) -> None:
    tokenizer = load_tokenizer(scorers[0].path)
    held_out = encode_documents(tokenizer, load_corpus([str(text_folder)]).held_out)

    chosen, byte_lengths = long_documents(scorers[0], (), "text", 513, 100)

    assert len(chosen) > 1
    assert all(any(np.array_equal(ids, document) for document in held_out) for ids in chosen)
    assert all(len(ids) >= 513 and ids.dtype == np.int64 for ids in chosen)
    np.testing.assert_array_equal(byte_lengths, token_byte_lengths(tokenizer))


def test_package_remembers_where_the_held_out_text_is(scorers: list[Scorer]) -> None:
    by_checkpoint, by_package = (long_documents(scorer, (), "text", 513, 100)[0] for scorer in scorers[:2])

    assert [ids.tolist() for ids in by_checkpoint] == [ids.tolist() for ids in by_package]


def test_given_text_is_taken_whole(scorers: list[Scorer], text_folder: Path) -> None:
    chosen, _ = long_documents(scorers[0], [str(text_folder)], "text", 513, 1000)

    assert len(chosen) == 40


def test_documents_that_were_not_held_out_in_training_are_never_scored(
    scorers: list[Scorer], text_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "model"
    shutil.copytree(scorers[0].path, checkpoint)
    scorer, edited = open_scorer(checkpoint), tmp_path / "text"
    shutil.copytree(text_folder, edited)
    scorer.corpus["sources"] = [str(edited)]
    before = long_documents(scorer, (), "text", 513, 100)[0]
    lost, *others = [file for file in sorted(edited.iterdir()) if Document("", file.read_text()).held_out]

    lost.write_text(lost.read_text() + " edited")
    after = long_documents(scorer, (), "text", 513, 100)[0]
    assert len(after) == len(before) - 1
    assert f"1 of the documents held out when {checkpoint} was trained are not there: {len(after)} are left" in (
        capfd.readouterr().err
    )

    for file in others:
        file.write_text(file.read_text() + " edited")
    with pytest.raises(CorpusError, match=r"none is; bring its text back, or give other with `sources`"):
        long_documents(scorer, (), "text", 513, 100)


def test_documents_as_many_as_asked_for(scorers: list[Scorer]) -> None:
    assert len(long_documents(scorers[0], (), "text", 100, 2)[0]) == 2


def test_documents_are_a_sample_whatever_their_order(scorers: list[Scorer], text_folder: Path, tmp_path: Path) -> None:
    files = sorted(text_folder.iterdir())
    backwards = tmp_path / "backwards"
    backwards.mkdir()
    for index, file in enumerate(reversed(files)):
        (backwards / f"{index:03}{file.suffix}").write_bytes(file.read_bytes())

    chosen, again = (long_documents(scorers[0], [str(of)], "text", 513, 5)[0] for of in (text_folder, backwards))

    assert [ids.tolist() for ids in chosen] == [ids.tolist() for ids in again]
    first = encode_documents(load_tokenizer(scorers[0].path), load_corpus([str(text_folder)]).training[:5])
    assert [ids.tolist() for ids in chosen] != [ids.tolist() for ids in first]


@pytest.mark.parametrize("text", ["the old tree " * 40, "QX7" * 40], ids=["merged", "bytes"])
def test_document_is_long_enough_to_the_token(scorers: list[Scorer], tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (ids,) = encode_documents(load_tokenizer(scorers[0].path), [Document("a", text)])

    (chosen,), _ = long_documents(scorers[0], [str(tmp_path)], "text", len(ids), 5)

    np.testing.assert_array_equal(chosen, ids)
    with pytest.raises(CorpusError) as caught:
        long_documents(scorers[0], [str(tmp_path)], "text", len(ids) + 1, 5)
    longest = len(ids) if len(ids) < len(text) else "fewer"  # texts with too few bytes are not even encoded
    assert str(caught.value) == (
        f"no document of {len(ids) + 1} tokens (the longest has {longest}); lower `lengths`, or give longer text "
        "with `sources`"
    )


def test_no_document_comes_near_the_length(scorers: list[Scorer]) -> None:
    with pytest.raises(CorpusError) as caught:
        long_documents(scorers[0], (), "text", 1_000_000, 5)

    assert str(caught.value) == (
        "no document of 1000000 tokens (the longest has fewer); lower `lengths`, or give longer text with `sources`"
    )
