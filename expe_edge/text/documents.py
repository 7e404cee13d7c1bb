"""Files to documents: plain text, JSON lines, JSON and parquet, compressed or not."""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from expe_edge.errors import CorpusError, reason_of
from expe_edge.kinds import is_unicode

#: What a folder's files are read by; a file that is named itself is plain text whatever its suffix.
TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".html", ".tex", ".csv", ".log", ".c", ".h", ".js", ".ts"})
LINES_SUFFIXES = frozenset({".jsonl", ".ndjson"})
ROWS_SUFFIXES = LINES_SUFFIXES | {".json", ".parquet"}
COMPRESSED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
#: One document in so many is held out.
HELD_OUT_EVERY = 8
#: Byte order marks and what they announce; without one, text is UTF-8.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins with UTF-16's
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
#: How JSON calls what is no text.
JSON_NAMES = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}


@dataclass(frozen=True)
class Document:
    """One text, `name` saying where it is from."""

    name: str
    text: str

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the content, whatever its name."""
        return hashlib.sha256(self.text.encode()).digest()

    @property
    def held_out(self) -> bool:
        """Whether the document is kept for evaluation.

        Decided by its content alone, so that the split is the same on every machine and in every order, and a copy
        of a held-out document under another name does not leak into training.
        """
        return int.from_bytes(self.digest[:4], "big") % HELD_OUT_EVERY == 0


@dataclass(frozen=True)
class Skipped:
    """A file of a folder that was not read, and why."""

    path: Path
    reason: str


def read_folder(folder: Path, text_field: str) -> Iterator[Document | Skipped]:
    """Yield the documents of all files under `folder`, through links too, in the order of their paths.

    Read are the suffixes above in any case, and files without one that are text. Others are `Skipped`: hidden ones,
    those of another suffix, and JSON that holds no documents, as the settings of a program do.
    """
    for path in sorted(_walk(folder)):
        reason = _not_wanted(path, folder)
        if reason is None:
            try:
                yield from list(read_file(path, text_field))
                continue
            except NotTextError as error:
                if _suffix(path) not in ("", ".json"):
                    raise
                reason = error.reason
        yield Skipped(path, reason)


def _walk(folder: Path) -> Iterator[Path]:
    """Yield every file under `folder` once, links followed, however they lead round."""
    seen = set[str]()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place, name) for name in names)


def _not_wanted(path: Path, folder: Path) -> str | None:
    if any(part.startswith(".") for part in path.relative_to(folder).parts):
        return "hidden"
    if not path.is_file():
        return "no file"
    suffix = _suffix(path)
    return None if not suffix or suffix in TEXT_SUFFIXES | ROWS_SUFFIXES else f"suffix {suffix}"


class NotTextError(CorpusError):
    """A file whose content is no text, or holds none where it should; `reason` without the file's name."""

    def __init__(self, where: object, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.reason = reason


def read_file(path: Path, text_field: str) -> Iterator[Document]:
    """Yield the documents of one file: every row of JSON lines, JSON or parquet, else the whole text.

    Raises:
        NotTextError: bytes that are no text, rows that are no objects, or without text in `text_field`.
        CorpusError: a file that cannot be read.
    """
    suffix = _suffix(path)
    try:
        if suffix in LINES_SUFFIXES:
            with _open(path) as lines:
                yield from _json_lines(path, lines, text_field)
        elif suffix == ".json":
            yield from _json(path, decoded(path, _content(path)), text_field)
        elif suffix == ".parquet":
            yield from _parquet(path, text_field)
        else:
            yield Document(str(path), decoded(path, _content(path)))
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise CorpusError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _suffix(path: Path) -> str:
    """Return the suffix that tells what is inside, in lower case: `.jsonl` of `rows.JSONL.gz`."""
    *before, last = ["", *path.suffixes]
    return (before[-1] if last.lower() in COMPRESSED else last).lower()


def _open(path: Path) -> BinaryIO:
    decompress = COMPRESSED.get(path.suffix.lower())
    opened: BinaryIO = decompress(path) if decompress else path.open("rb")
    return opened


def _content(path: Path) -> bytes:
    with _open(path) as file:
        return file.read()


def decoded(where: object, content: bytes) -> str:
    """Return bytes as text: UTF-8, or what a byte order mark says, without the mark and with line ends as \\n.

    Raises:
        NotTextError: bytes that are no such text; `where` they are from.
    """
    encoding = next((encoding for mark, encoding in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise NotTextError(where, f"not {name} text ({error.reason} at byte {error.start})") from error
    if "\0" in text:
        raise NotTextError(where, "holds NUL characters: binary, or UTF-16 without its mark; convert it to UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json_lines(path: Path, lines: Iterable[bytes], text_field: str) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}: line {number}"
            yield Document(f"{path}:{number}", _field(where, _parsed(where, decoded(path, line)), text_field))


def _json(path: Path, text: str, text_field: str) -> Iterator[Document]:
    """Read a JSON file: an array of rows, one row, or, as some write it, lines."""
    try:
        rows = json.loads(text)
    except RecursionError as error:
        raise NotTextError(path, "nested too deeply") from error
    except ValueError:
        yield from _json_lines(path, (line.encode() for line in text.split("\n")), text_field)
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield Document(f"{path}:{number}", _field(f"{path}: row {number}", row, text_field))


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise NotTextError(where, "nested too deeply") from error
    except ValueError as error:
        raise NotTextError(where, f"not JSON ({error})") from error


def _field(where: str, row: Any, text_field: str) -> str:
    """Return the text of one row; nothing else is taken for text."""
    if not isinstance(row, dict):
        raise NotTextError(where, f"{json_name(row)}, not a JSON object with a {text_field!r} field")
    if text_field not in row:
        raise NotTextError(where, f"no field {text_field!r}, there are {', '.join(row) or 'none'}; set `text_field`")
    text = row[text_field]
    if not isinstance(text, str):
        raise NotTextError(where, f"{text_field!r} is {json_name(text)}, not text; set `text_field`")
    if not is_unicode(text):
        raise NotTextError(where, "holds half a surrogate pair, which is no text")
    return text


def json_name(value: Any) -> str:
    """Return how JSON calls a value that should be text."""
    return "text" if isinstance(value, str) else JSON_NAMES.get(type(value), "null")


def _parquet(path: Path, text_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, ValueError) as error:  # names of columns may be no text
        raise CorpusError(f"{path}: not a parquet file") from error
    schema = file.schema_arrow
    if text_field not in schema.names:
        raise NotTextError(path, f"no column {text_field!r}, there are {', '.join(schema.names)}; set `text_field`")
    kind = schema.field(text_field).type
    value_kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(value_kind).removeprefix("large_").removesuffix("_view") not in ("string", "binary"):
        raise NotTextError(path, f"column {text_field!r} is {kind}, not text; set `text_field`")
    row = 0
    for values in _columns(path, file, text_field):
        for value in values:
            if value is None:
                raise NotTextError(f"{path}: row {row}", f"{text_field!r} is null, not text")
            text = value if isinstance(value, str) else decoded(f"{path}: row {row}", value)
            yield Document(f"{path}:{row}", text)
            row += 1


def _columns(path: Path, file: Any, name: str) -> Iterator[list[Any]]:
    """Yield what a column of a parquet file holds, group of rows by group, whose bytes nothing has looked at before."""
    import pyarrow

    try:
        for batch in file.iter_batches(columns=[name]):
            yield batch.column(0).to_pylist()
    except UnicodeDecodeError as error:
        raise NotTextError(path, f"column {name!r} is not UTF-8 text ({error.reason})") from error
    except pyarrow.ArrowException as error:
        raise CorpusError(f"{path}: damaged ({reason_of(error)})") from error
