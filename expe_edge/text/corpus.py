"""Text: where documents come from, and how they divide into training and held-out.

A source is a file, a folder, a glob, JSON lines, parquet, or the name of a `datasets` dataset. Without one, the
source code of the running interpreter's standard library is the text: real, and always there.
"""

from __future__ import annotations

import glob
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from expe_edge.errors import CorpusError

#: The built-in text: the standard library's modules, without or with its tests.
STDLIB = "python-stdlib"
STDLIB_WITH_TESTS = "python-stdlib+tests"

TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".html", ".tex", ".csv", ".log", ".c", ".h", ".js", ".ts"})
#: Documents with less text than this teach nothing and are left out.
SHORTEST_DOCUMENT = 64
#: One document in so many is held out.
HELD_OUT_EVERY = 8


@dataclass(frozen=True)
class Document:
    """One text, `name` saying where it is from."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the document is kept for evaluation.

        Decided by its content alone, so that the split is the same on every machine and in every order, and a copy
        of a held-out document under another name does not leak into training.
        """
        digest = hashlib.sha256(self.text.encode()).digest()
        return int.from_bytes(digest[:4], "big") % HELD_OUT_EVERY == 0


@dataclass(frozen=True)
class Corpus:
    """Documents divided into training and held-out, without duplicates."""

    sources: tuple[str, ...]
    training: tuple[Document, ...]
    held_out: tuple[Document, ...]


def load_corpus(sources: Sequence[str] = (), text_field: str = "text", *, option: str = "--data") -> Corpus:
    """Read all documents of `sources`; of the standard library where there are none.

    Args:
        sources: files, folders, globs, `.jsonl`, `.parquet`, names of `datasets` datasets (`NAME` or
            `NAME:CONFIG`), `python-stdlib` or `python-stdlib+tests`.
        text_field: the field that holds the text in JSON lines, parquet and datasets.
        option: of the command line, that would name other sources.

    Raises:
        CorpusError: a source that is missing, unreadable or holds no text.
    """
    sources = tuple(sources) or (STDLIB,)
    documents: dict[str, Document] = {}
    for source in sources:
        try:
            found = [one for one in read_source(source, text_field) if len(one.text) >= SHORTEST_DOCUMENT]
        except CorpusError as error:
            raise CorpusError(f"{option} {error}") from error
        if not found:
            raise CorpusError(f"{option} {source}: no text of at least {SHORTEST_DOCUMENT} characters in it")
        for document in found:
            documents.setdefault(document.text, document)
    training = tuple(document for document in documents.values() if not document.held_out)
    held_out = tuple(document for document in documents.values() if document.held_out)
    if not training:  # one document, or a few that chance puts on one side: there is nothing to hold out
        training, held_out = held_out, ()
    return Corpus(sources, training, held_out)


def absolute_source(source: str) -> str:
    """Return a path or glob made absolute, so that it is found again from elsewhere; other sources as they are."""
    if source in (STDLIB, STDLIB_WITH_TESTS):
        return source
    return str(Path(source).absolute()) if Path(source).exists() or glob.has_magic(source) else source


def read_source(source: str, text_field: str) -> Iterator[Document]:
    """Yield the documents of one source, in a fixed order."""
    if source in (STDLIB, STDLIB_WITH_TESTS):
        yield from _standard_library(with_tests=source == STDLIB_WITH_TESTS)
        return
    path = Path(source)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix in TEXT_SUFFIXES | {".jsonl", ".parquet"}]
        yield from _files(files, text_field)
    elif path.is_file():
        yield from _files([path], text_field)
    elif glob.has_magic(source):
        names = sorted(glob.glob(source, recursive=True))  # noqa: PTH207  # Path.glob takes no absolute pattern
        yield from _files([Path(name) for name in names], text_field)
    elif path.suffix or source.startswith(("/", "./", "../", "~")) or source.endswith("/"):
        raise CorpusError(f"{source}: no such file or folder")
    else:
        yield from _hub_dataset(source, text_field)


def _standard_library(*, with_tests: bool) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        is_test = any(part in ("test", "tests", "idle_test") for part in parts)
        if "site-packages" in parts or "dist-packages" in parts or (is_test and not with_tests):
            continue
        text = path.read_bytes().decode("utf-8", errors="replace")
        yield Document(f"{STDLIB}/{path.relative_to(root).as_posix()}", text)


def _files(paths: Iterable[Path], text_field: str) -> Iterator[Document]:
    for path in paths:
        if not path.is_file():
            continue
        try:
            if path.suffix == ".jsonl":
                yield from _json_lines(path, text_field)
            elif path.suffix == ".parquet":
                yield from _parquet(path, text_field)
            else:
                yield Document(str(path), path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise CorpusError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
        except OSError as error:
            raise CorpusError(f"{path}: {error.strerror or error}") from error


def _json_lines(path: Path, text_field: str) -> Iterator[Document]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = str(json.loads(line)[text_field])
            except (ValueError, KeyError, TypeError) as error:
                raise CorpusError(
                    f"{path}: line {number} is not a JSON object with a {text_field!r} field; set --text-field"
                ) from error
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise CorpusError(f"{path}: line {number} holds half a surrogate pair, which is no text")
            yield Document(f"{path}:{number}", text)


def _parquet(path: Path, text_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise CorpusError(f"{path}: not a parquet file") from error
    if text_field not in file.schema_arrow.names:
        raise CorpusError(
            f"{path}: no column {text_field!r}, there are {', '.join(file.schema_arrow.names)}; set --text-field"
        )
    row = 0
    for batch in file.iter_batches(columns=[text_field]):
        for value in batch.column(0).to_pylist():
            yield Document(f"{path}:{row}", str(value))
            row += 1


def _hub_dataset(source: str, text_field: str) -> Iterator[Document]:
    import datasets

    name, _, config = source.partition(":")
    try:
        dataset = datasets.load_dataset(name, config or None, split="train")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CorpusError(f"{source}: no such file, and not a dataset within reach ({reason})") from error
    if text_field not in dataset.column_names:
        raise CorpusError(f"{source}: no column {text_field!r}, there are {', '.join(dataset.column_names)}")
    for row, text in enumerate(dataset[text_field]):
        yield Document(f"{source}:{row}", str(text))
