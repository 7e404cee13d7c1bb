"""Files to documents: every format, and one line of refusal for what is no text."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from expe_edge.errors import CorpusError
from expe_edge.text.documents import Document, Skipped, read_file, read_folder

ROWS: list[dict[str, Any]] = [{"text": "one"}, {"text": "zwei\nund drei", "other": [1]}, {"text": ""}]
TEXTS: list[str] = [row["text"] for row in ROWS]
AS_LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def texts(path: Path, field: str = "text") -> list[str]:
    return [document.text for document in read_file(path, field)]


def documents_of(read: Iterable[Document | Skipped]) -> list[Document]:
    """What was read, of which nothing may have been left out."""
    found = list(read)
    documents = [one for one in found if isinstance(one, Document)]
    assert documents == found
    return documents


def refusal(path: Path, field: str = "text") -> str:
    """Return what reading `path` is refused with, after the path."""
    with pytest.raises(CorpusError) as caught:
        list(read_file(path, field))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# Formats.


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.JSONL", "rows.json"])
def test_rows_are_documents_whatever_lines_are_called(tmp_path: Path, name: str) -> None:
    assert texts(write(tmp_path / name, AS_LINES)) == TEXTS


def test_a_json_array_and_a_json_object(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "rows.json", json.dumps(ROWS, indent=2).encode())) == TEXTS
    assert texts(write(tmp_path / "row.json", json.dumps(ROWS[1], indent=2).encode())) == TEXTS[1:2]


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".XZ", lzma.compress)]
)
@pytest.mark.parametrize(
    ("name", "expected"), [("a.jsonl", TEXTS), ("a.txt", [AS_LINES.decode()]), ("a", [AS_LINES.decode()])]
)
def test_compressed(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes], name: str, expected: list[str]
) -> None:
    file = write(tmp_path / (name + suffix), compress(AS_LINES))
    assert texts(file) == expected
    assert texts(tmp_path / (name + suffix)) == [one.text for one in documents_of(read_folder(tmp_path, "text"))]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding_and_is_no_text(tmp_path: Path, encoding: str) -> None:
    assert texts(write(tmp_path / "a.txt", "écrit\r\nici".encode(encoding))) == ["écrit\nici"]


def test_a_byte_order_mark_before_json_lines(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + AS_LINES)) == TEXTS


@pytest.mark.parametrize("line_end", ["\r\n", "\r"])
def test_line_ends_are_newlines(tmp_path: Path, line_end: str) -> None:
    assert texts(write(tmp_path / "a.txt", f"a{line_end}b{line_end}".encode())) == ["a\nb\n"]


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(TEXTS, pyarrow.large_string()),
        pyarrow.array([text.encode() for text in TEXTS], pyarrow.binary()),
        pyarrow.array(TEXTS).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_parquet_columns_of_text(tmp_path: Path, column: Any) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "rows.parquet")
    assert texts(tmp_path / "rows.parquet") == TEXTS


# Refusals.


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (["a", "b"], "'text' is a list, not text; set `text_field`"),
        ([{"role": "user", "content": "a"}], "'text' is a list, not text; set `text_field`"),
        ({"a": 1}, "'text' is an object, not text; set `text_field`"),
        (7, "'text' is a number, not text; set `text_field`"),
        (True, "'text' is true or false, not text; set `text_field`"),
        (None, "'text' is null, not text; set `text_field`"),
    ],
)
@pytest.mark.parametrize(("name", "where"), [("a.jsonl", "line 2"), ("a.json", "row 2")])
def test_values_that_are_no_text(tmp_path: Path, value: object, reason: str, name: str, where: str) -> None:
    rows = [ROWS[0], {"text": value}]
    content = json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows))
    assert refusal(write(tmp_path / name, content.encode())) == f"{where}: {reason}"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"body": "b", "id": 1}', "no field 'text', there are body, id; set `text_field`"),
        ("{}", "no field 'text', there are none; set `text_field`"),
        ('["text"]', "a list, not a JSON object with a 'text' field"),
        ('"text"', "text, not a JSON object with a 'text' field"),
        ("null", "null, not a JSON object with a 'text' field"),
        ('{"text": "cut', "not JSON (Unterminated string starting at: line 1 column 10 (char 9))"),
        ('{"text": "\\ud83d"}', "holds half a surrogate pair, which is no text"),
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
)
def test_lines_that_are_no_documents(tmp_path: Path, line: str, reason: str) -> None:
    assert refusal(write(tmp_path / "a.jsonl", AS_LINES + line.encode())) == f"line 4: {reason}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"abc\xff", "not UTF-8 text (invalid start byte at byte 3)"),
        (b"a\0b", "holds NUL characters: binary, or UTF-16 without its mark; convert it to UTF-8"),
        (
            "abc".encode("utf-16-le"),
            "holds NUL characters: binary, or UTF-16 without its mark; convert it to UTF-8",
        ),
        (b"\xff\xfea", "not UTF-16 text (truncated data at byte 2)"),
    ],
)
def test_bytes_that_are_no_text(tmp_path: Path, content: bytes, reason: str) -> None:
    assert refusal(write(tmp_path / "a.txt", content)) == reason


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"no archive", id="no archive"),
        pytest.param(gzip.compress(b"x" * 1000)[:-9], id="gzip cut short"),
        pytest.param(lzma.compress(b"x" * 1000)[:-9], id="xz cut short"),
    ],
)
def test_damaged_archives(tmp_path: Path, suffix: str, content: bytes) -> None:
    refusal(write(tmp_path / f"a.txt{suffix}", content))


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ([["a"], ["b"]], "column 'text' is list<element: string>, not text; set `text_field`"),
        ([{"a": 1}], "column 'text' is struct<a: int64>, not text; set `text_field`"),
        ([1], "column 'text' is int64, not text; set `text_field`"),
        (["a", None], "row 1: 'text' is null, not text"),
        ([b"\xff"], "row 0: not UTF-8 text (invalid start byte at byte 0)"),
        (
            pyarrow.Array.from_buffers(
                pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")]
            ),
            "column 'text' is not UTF-8 text (invalid start byte)",
        ),
    ],
)
def test_parquet_columns_that_are_no_text(tmp_path: Path, column: Any, reason: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "rows.parquet")
    assert refusal(tmp_path / "rows.parquet") == reason


@pytest.mark.parametrize("byte", [0x03, 0xFF])
def test_damaged_parquet(tmp_path: Path, byte: int) -> None:
    """Whichever byte is another, rows are read or the file is refused."""
    rows = pyarrow.table({"text": ["eins", "zwei", "drei", "zwei", "eins"] * 5})
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet", compression="none")
    content, read, refused = (tmp_path / "rows.parquet").read_bytes(), 0, 0
    for place in range(len(content)):
        changed = content[:place] + bytes([byte]) + content[place + 1 :]
        try:
            texts(write(tmp_path / "rows.parquet", changed))
            read += 1
        except CorpusError:
            refused += 1
    assert read > 0
    assert refused > 0


# Folders.


def test_a_folder_gives_what_can_be_read_and_names_the_rest(tmp_path: Path) -> None:
    for name in ("UP.TXT", "README", "deep/a.py", "deep/rows.ndjson"):
        write(tmp_path / name, AS_LINES)
    write(tmp_path / "settings.json", b'{"name": "x"}')
    write(tmp_path / "picture.png", b"\x89PNG")
    write(tmp_path / "program", b"\x7fELF\0\0")
    write(tmp_path / ".git" / "HEAD", b"ref")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    read = list(read_folder(tmp_path, "text"))

    names = [one.name for one in read if isinstance(one, Document)]
    lines = [f"{tmp_path}/deep/rows.ndjson:{line}" for line in (1, 2, 3)]
    assert names == [f"{tmp_path}/README", f"{tmp_path}/UP.TXT", f"{tmp_path}/deep/a.py", *lines]
    assert {str(one.path.relative_to(tmp_path)): one.reason for one in read if isinstance(one, Skipped)} == {
        ".git/HEAD": "hidden",
        "gone.txt": "no file",
        "picture.png": "suffix .png",
        "program": "holds NUL characters: binary, or UTF-16 without its mark; convert it to UTF-8",
        "settings.json": "no field 'text', there are name; set `text_field`",
    }


def test_linked_folders_are_read_once_however_they_lead_round(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "b.txt", b"b")
    write(tmp_path / "texts" / "a.txt", b"a")
    (tmp_path / "texts" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "texts" / "again").symlink_to(tmp_path / "texts")
    read = [one.text for one in read_folder(tmp_path / "texts", "text") if isinstance(one, Document)]
    assert sorted(read) == ["a", "b"]


def test_bad_text_in_a_folder_is_refused_not_skipped(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"\xff")
    with pytest.raises(CorpusError, match=r"a\.txt: not UTF-8 text"):
        list(read_folder(tmp_path, "text"))
