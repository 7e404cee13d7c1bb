"""Text: where documents come from, and how they divide into training and held-out.

A source is a file, a folder, a glob, or the name of a `datasets` dataset. Without one, the source code of the running
interpreter's standard library is the text: real, and always there.
"""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from expe_edge.errors import CorpusError, reason_of, shown
from expe_edge.text.documents import Document, Skipped, json_name, read_file, read_folder

#: The built-in text: the standard library's modules, without or with its tests.
STDLIB = "python-stdlib"
STDLIB_WITH_TESTS = "python-stdlib+tests"
#: Documents with less text than this teach nothing and are left out.
SHORTEST_DOCUMENT = 64
#: So many skipped files are named one by one.
NAMED = 3
#: A checkpoint remembers so many of its held-out documents.
REMEMBERED = 10_000
#: Of a digest so many hexadecimal digits are kept: 64 bits.
DIGEST_DIGITS = 16


@dataclass(frozen=True)
class Corpus:
    """Documents divided into training and held-out, without duplicates.

    skipped: files of folders left unread. missing: held-out documents that were asked for, but are not in the sources.
    """

    sources: tuple[str, ...]
    training: tuple[Document, ...]
    held_out: tuple[Document, ...]
    skipped: tuple[Skipped, ...] = ()
    missing: int = 0

    def digests(self) -> list[str]:
        """Return what tells the held-out documents from others: the digests of `REMEMBERED` of them, as a sample."""
        return sorted(map(_short_digest, self.held_out))[:REMEMBERED]


def load_corpus(
    sources: Sequence[str] = (),
    text_field: str = "text",
    held_out: Sequence[str] | None = None,
) -> Corpus:
    """Read all documents of `sources`; of the standard library where there are none.

    Args:
        sources: files, folders, globs, names of `datasets` datasets (`NAME` or `NAME:CONFIG`), `python-stdlib` or
            `python-stdlib+tests`.
        text_field: the field that holds the text in JSON lines, JSON, parquet and datasets.
        held_out: `Corpus.digests` of what was held out when a model was trained. No other document counts as held out
            then: sources change, and an edited version of a document that was trained on is as good as trained on.

    Raises:
        CorpusError: a source that is missing, unreadable or holds no text.
    """
    sources = tuple(sources) or (STDLIB,)
    documents: dict[str, Document] = {}
    skipped: list[Skipped] = []
    for source in sources:
        if not source.strip():
            raise CorpusError("`sources` is empty; name a file, a folder or a dataset")
        try:
            read = list(read_source(source, text_field))
        except CorpusError as error:
            raise CorpusError(f"`sources` {error}") from error
        except OSError as error:  # a name that no file system takes
            raise CorpusError(f"`sources` {shown(source)}: {error.strerror}") from error
        unread = [item for item in read if isinstance(item, Skipped)]
        skipped += unread
        texts = [item for item in read if isinstance(item, Document) and len(item.text) >= SHORTEST_DOCUMENT]
        if not texts:
            nothing = f"`sources` {source}: no text of at least {SHORTEST_DOCUMENT} characters in it"
            raise CorpusError("; ".join([nothing, *describe_skipped(unread)]))
        for document in texts:
            documents.setdefault(document.text, document)
    training = tuple(document for document in documents.values() if not document.held_out)
    kept = tuple(document for document in documents.values() if document.held_out)
    if held_out is not None:
        known = set(held_out)
        remembered = tuple(document for document in kept if _short_digest(document) in known)
        if not training:  # a run took them all, or no text of its training is left
            training = tuple(document for document in kept if _short_digest(document) not in known)
        return Corpus(sources, training, remembered, tuple(skipped), missing=len(known) - len(remembered))
    if not training:  # one document, or a few that chance puts on one side: there is nothing to hold out
        training, kept = kept, ()
    return Corpus(sources, training, kept, tuple(skipped))


def _short_digest(document: Document) -> str:
    return document.digest.hex()[:DIGEST_DIGITS]


def describe_skipped(skipped: Iterable[Skipped]) -> list[str]:
    """Return a line for each reason to skip: the first files, and how many more."""
    by_reason: dict[str, list[str]] = {}
    for item in skipped:
        by_reason.setdefault(item.reason, []).append(str(item.path))
    lines = []
    for reason, names in by_reason.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        lines.append(f"not read, {reason}: {', '.join(names[:NAMED])}{more}")
    return lines


def absolute_source(source: str) -> str:
    """Return a path or glob made absolute, so that it is found again from elsewhere; other sources as they are."""
    if source in (STDLIB, STDLIB_WITH_TESTS):
        return source
    exists = os.path.exists(source)  # noqa: PTH110  # Path.exists raises at a name that no file system takes
    return str(Path(source).absolute()) if exists or glob.has_magic(source) else source


def read_source(source: str, text_field: str) -> Iterator[Document | Skipped]:
    """Yield the documents of one source, in a fixed order, and the files of a folder that are none."""
    if source in (STDLIB, STDLIB_WITH_TESTS):
        yield from _standard_library(with_tests=source == STDLIB_WITH_TESTS)
        return
    path = Path(source)
    if path.is_dir():
        yield from read_folder(path, text_field)
    elif path.exists():
        yield from read_file(path, text_field)
    elif glob.has_magic(source):
        for name in sorted(glob.glob(source, recursive=True)):  # noqa: PTH207  # Path.glob takes no absolute pattern
            if Path(name).is_file():
                yield from read_file(Path(name), text_field)
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


def _hub_dataset(source: str, text_field: str) -> Iterator[Document]:
    import datasets

    name, _, config = source.partition(":")
    try:
        dataset = datasets.load_dataset(name, config or None, split="train")
    except (OSError, ValueError) as error:
        raise CorpusError(f"{source}: no such file, and not a dataset within reach ({reason_of(error)})") from error
    if text_field not in dataset.column_names:
        raise CorpusError(f"{source}: no column {text_field!r}, there are {', '.join(dataset.column_names)}")
    for row, text in enumerate(dataset[text_field]):
        if not isinstance(text, str):
            raise CorpusError(f"{source}: row {row}: {text_field!r} is {json_name(text)}, not text; set `text_field`")
        yield Document(f"{source}:{row}", text)
