"""Text: sources, their errors, and a split that leaks nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expe_edge.errors import CorpusError
from expe_edge.text.corpus import (
    SHORTEST_DOCUMENT,
    STDLIB_WITH_TESTS,
    Corpus,
    load_corpus,
    read_source,
)
from expe_edge.text.documents import HELD_OUT_EVERY, Document
from tests.text.test_documents import documents_of

TEST_FOLDERS = {"test", "tests", "idle_test"}


def long_text(word: str) -> str:
    """A text that is long enough to be a document."""
    return f"{word} " * SHORTEST_DOCUMENT


def texts(corpus: Corpus) -> list[str]:
    """All texts of a corpus, sorted."""
    return sorted(document.text for document in corpus.training + corpus.held_out)


def split(corpus: Corpus) -> tuple[set[str], set[str]]:
    """The training texts and the held-out texts."""
    return {document.text for document in corpus.training}, {document.text for document in corpus.held_out}


@pytest.fixture(scope="module")
def standard_library() -> Corpus:
    """The default text."""
    return load_corpus()


# The split


def test_an_edited_document_is_not_held_out_from_a_model_trained_before(text_folder: Path, tmp_path: Path) -> None:
    """Edited files fall on either side anew, and those that fall on the held-out side may have been trained on."""
    trained, edited = load_corpus([str(text_folder)]), tmp_path / "edited"
    shutil.copytree(text_folder, edited)
    for index, file in enumerate(sorted(edited.iterdir())):
        if index % 2:
            file.write_text(file.read_text(encoding="utf-8") + "edited", encoding="utf-8")

    anew = load_corpus([str(edited)])
    known = load_corpus([str(edited)], held_out=trained.digests())

    assert not split(anew)[1] <= split(trained)[1]
    assert split(known)[1] == split(anew)[1] & split(trained)[1] != set()
    assert known.missing == len(trained.held_out) - len(known.held_out) > 0
    assert known.training == anew.training


def test_held_out_documents_are_found_where_they_alone_are_left(text_folder: Path, tmp_path: Path) -> None:
    trained = load_corpus([str(text_folder)])
    for document in trained.held_out:
        (tmp_path / Path(document.name).name).write_text(document.text, encoding="utf-8")

    left = load_corpus([str(tmp_path)], held_out=trained.digests())

    assert split(left) == (set(), split(trained)[1])
    assert left.missing == 0


def test_documents_of_one_side_are_trained_on_when_read_again_too(text_folder: Path) -> None:
    document = load_corpus([str(text_folder)]).held_out[0]
    trained = load_corpus([document.name])
    assert load_corpus([document.name], held_out=trained.digests()) == trained
    assert split(trained) == ({document.text}, set())


@given(st.text(), st.text(), st.text())
def test_a_documents_half_depends_on_its_text_alone(text: str, name: str, other_name: str) -> None:
    assert Document(name, text).held_out is Document(other_name, text).held_out


def test_split_is_the_same_in_any_order_and_under_any_names(text_folder: Path, tmp_path: Path) -> None:
    files = sorted(text_folder.iterdir())
    files = [files[index] for index in np.random.default_rng(1).permutation(len(files))]
    for number, file in enumerate(files):
        shutil.copyfile(file, tmp_path / f"renamed-{number:03}.md")

    expected = split(load_corpus([str(text_folder)]))

    assert split(load_corpus([str(text_folder)])) == expected
    assert split(load_corpus([str(file) for file in files])) == expected
    assert split(load_corpus([str(tmp_path)])) == expected
    assert expected[0]
    assert expected[1]


def test_a_copy_of_a_document_stands_in_no_other_half(text_folder: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    shutil.copytree(text_folder, copies)

    once, twice = load_corpus([str(text_folder)]), load_corpus([str(copies), str(text_folder)])

    training, held_out = split(twice)
    assert not training & held_out
    assert texts(twice) == texts(once)  # and no text stands there twice


def test_one_document_in_so_many_is_held_out(standard_library: Corpus) -> None:
    total = len(standard_library.training) + len(standard_library.held_out)

    share = len(standard_library.held_out) / total

    assert total > 400
    assert abs(share - 1 / HELD_OUT_EVERY) < 4 * (0.125 * 0.875 / total) ** 0.5  # four standard deviations


# The default: the standard library's source


def test_default_is_the_standard_library_without_its_tests(standard_library: Corpus) -> None:
    documents = standard_library.training + standard_library.held_out
    by_name = {document.name: document.text for document in documents}

    assert standard_library.sources == ("python-stdlib",)
    assert by_name["python-stdlib/argparse.py"] == Path(shutil.__file__).with_name("argparse.py").read_text("utf-8")
    assert "python-stdlib/json/decoder.py" in by_name
    assert sum(map(len, by_name.values())) > 5_000_000
    assert not any(TEST_FOLDERS & set(Path(name).parts) for name in by_name)
    assert not any("site-packages" in name or "dist-packages" in name for name in by_name)


def test_tests_come_with_the_longer_name_of_the_standard_library(standard_library: Corpus) -> None:
    plain = set(texts(standard_library))
    everything = {document.text: document.name for document in documents_of(read_source(STDLIB_WITH_TESTS, "text"))}
    added = {name for text, name in everything.items() if len(text) >= SHORTEST_DOCUMENT and text not in plain}

    assert plain < set(everything)
    assert all(TEST_FOLDERS & set(Path(name).parts) for name in added)


# Sources


def test_folder_is_read_to_its_depths_and_other_files_are_left_out(tmp_path: Path) -> None:
    for name in ("a.txt", "deep/er/b.md", "deep/c.py", "picture.png", "deep/noise.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(long_text(name), encoding="utf-8")

    assert texts(load_corpus([str(tmp_path)])) == sorted(map(long_text, ("a.txt", "deep/er/b.md", "deep/c.py")))


def test_file_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    file = tmp_path / "notes.unusual"
    file.write_text(long_text("écrit"), encoding="utf-8")

    assert texts(load_corpus([str(file)])) == [long_text("écrit")]


@pytest.mark.parametrize(
    ("pattern", "found"), [("*.txt", ["a", "b"]), ("**/*.txt", ["a", "b", "c"]), ("[b-z].*", ["b"])]
)
def test_glob_is_expanded(tmp_path: Path, pattern: str, found: list[str]) -> None:
    for name in ("a.txt", "b.txt", "deep/c.txt", "a.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(long_text(Path(name).stem + Path(name).suffix), encoding="utf-8")

    assert texts(load_corpus([str(tmp_path / pattern)])) == [long_text(f"{name}.txt") for name in found]


@pytest.mark.parametrize("field", ["text", "body"])
def test_json_lines_give_a_document_for_each_line(tmp_path: Path, field: str) -> None:
    file = tmp_path / "lines.jsonl"
    lines = [json.dumps({field: long_text(word), "other": 1}) for word in ("one", "two", "drei")]
    file.write_text("\n\n".join(lines) + "\n", encoding="utf-8")

    assert texts(load_corpus([str(file)], field)) == sorted(map(long_text, ("one", "two", "drei")))
    found = documents_of(read_source(str(file), field))
    assert [document.name for document in found] == [f"{file}:1", f"{file}:3", f"{file}:5"]


@pytest.mark.parametrize("field", ["text", "body"])
def test_parquet_gives_a_document_for_each_row(tmp_path: Path, field: str) -> None:
    file = tmp_path / "rows.parquet"
    rows = [long_text(word) for word in ("one", "two", "drei")]
    pyarrow.parquet.write_table(pyarrow.table({field: rows, "other": [1, 2, 3]}), file)

    assert texts(load_corpus([str(file)], field)) == sorted(rows)
    found = documents_of(read_source(str(file), field))
    assert [document.name for document in found] == [f"{file}:{row}" for row in range(3)]


def test_several_sources_are_joined_and_short_documents_left_out(tmp_path: Path) -> None:
    for name, text in (("a.txt", long_text("a")), ("b.jsonl", json.dumps({"text": long_text("b")}))):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "short.txt").write_text("s" * (SHORTEST_DOCUMENT - 1), encoding="utf-8")
    (tmp_path / "enough.txt").write_text("e" * SHORTEST_DOCUMENT, encoding="utf-8")

    corpus = load_corpus([str(tmp_path / name) for name in ("a.txt", "b.jsonl")] + [str(tmp_path)])

    assert texts(corpus) == sorted([long_text("a"), long_text("b"), "e" * SHORTEST_DOCUMENT])


# Errors


@pytest.mark.parametrize("name", ["nothing.txt", "/nothing/at/all", "./nothing", "../nothing"])
def test_missing_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)

    assert refusal(name) == f"`sources` {name}: no such file or folder"


def test_name_of_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert refusal("no-such-dataset").startswith(
        "`sources` no-such-dataset: no such file, and not a dataset within reach ("
    )


@pytest.mark.parametrize(
    ("content", "unread"),
    [
        ({}, ""),
        ({"short.txt": b"short"}, ""),
        ({"picture.png": b"x" * 200}, "; not read, suffix .png: {folder}/picture.png"),
        (
            {f"{n}.bin": b"x" for n in range(5)},
            "; not read, suffix .bin: {folder}/0.bin, {folder}/1.bin, {folder}/2.bin and 2 more",
        ),
    ],
    ids=str,
)
def test_no_text(tmp_path: Path, content: dict[str, bytes], unread: str) -> None:
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)

    nothing = f"`sources` {tmp_path}: no text of at least 64 characters in it"
    assert refusal(tmp_path) == nothing + unread.format(folder=tmp_path)
    assert refusal(tmp_path / "*.txt") == f"`sources` {tmp_path}/*.txt: no text of at least 64 characters in it"


def test_second_source_without_text_is_named(text_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError) as caught:
        load_corpus([str(text_folder), str(tmp_path)])

    assert str(caught.value) == f"`sources` {tmp_path}: no text of at least 64 characters in it"


@pytest.mark.parametrize("source", ["", " "])
def test_a_source_without_a_name(source: str) -> None:
    with pytest.raises(CorpusError, match=r"^`sources` is empty; name a file, a folder or a dataset$"):
        load_corpus([source])


def test_files_of_a_folder_that_were_not_read_are_known(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(long_text("a"), encoding="utf-8")
    (tmp_path / "a.png").write_bytes(b"png")

    assert [(one.path.name, one.reason) for one in load_corpus([str(tmp_path)]).skipped] == [("a.png", "suffix .png")]


def test_missing_parquet_column(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "title": ["y"]}), file)

    assert refusal(file) == f"`sources` {file}: no column 'text', there are body, title; set `text_field`"


@pytest.mark.parametrize("kept", [0, 100])
def test_truncated_parquet(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [long_text("x")]}), file)
    file.write_bytes(file.read_bytes()[:kept])

    assert refusal(file) == f"`sources` {file}: not a parquet file"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"abc\xff", "invalid start byte at byte 3"),
        (b"\xe2\x82", "unexpected end of data at byte 0"),
        (b"ab\xc3(", "invalid continuation byte at byte 2"),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_text_that_is_not_utf8(tmp_path: Path, data: bytes, reason: str, suffix: str) -> None:
    file = tmp_path / f"latin{suffix}"
    file.write_bytes(data)

    assert refusal(file) == f"`sources` {file}: not UTF-8 text ({reason})"
    assert refusal(tmp_path, about=file) == f"`sources` {file}: not UTF-8 text ({reason})"


def refusal(source: str | Path, about: Path | None = None) -> str:
    """Return the message of the `CorpusError` that loading `source` raises."""
    with pytest.raises(CorpusError) as caught:
        load_corpus([str(source)])
    message = str(caught.value)
    assert "\n" not in message
    assert str(about or source) in message
    return message
