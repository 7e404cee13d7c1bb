"""A package on disk: one self-contained directory, complete or absent, every file hashed."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from expe_edge.errors import ExportError, PackageError
from expe_edge.package.manifest import LARGEST_MANIFEST, MANIFEST_FILE, Manifest

ORT_FILE, OPERATORS_FILE = "model.ort", "required_operators.config"
MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
#: The model card, which people edit: no part of what is hashed.
CARD_FILE = "README.md"
#: What messages call what is written here.
A_PACKAGE = "a package"
#: Ends the name of a package that is moved aside for the one that replaces it.
OLD = "-old"
#: The word by which a graph of ONNX says that a weight is in another file.
ELSEWHERE = b"location"


@dataclass(frozen=True)
class Package:
    """A package on disk whose manifest has been read, and whose files are verified before anything of them is used."""

    path: Path
    manifest: Manifest

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.path.iterdir())

    @property
    def model_path(self) -> Path:
        """The graph."""
        return self.path / MODEL_FILE

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer."""
        return self.path / TOKENIZER_FILE


def is_package(path: Path) -> bool:
    """Tell whether `path` has a package's manifest."""
    return (path / MANIFEST_FILE).is_file()


def read_package(path: Path) -> Package:
    """Read the manifest of `path` and verify its format version and the hash of every file.

    Raises:
        PackageError: no package there, a newer format, a file that is missing or was changed, or a graph whose weights
            are in other files.
    """
    package = open_manifest(path)
    verify_files(package)
    return package


def open_manifest(path: Path) -> Package:
    """Read the manifest of `path` alone: what is used of its files must be verified with `verify_files`.

    Raises:
        PackageError: no package there, a newer format, or a file that is missing.
    """
    if not path.is_dir():
        raise PackageError(f"{path}: no such package directory")
    try:
        if (path / MANIFEST_FILE).stat().st_size > LARGEST_MANIFEST:
            raise PackageError(f"{path}: {MANIFEST_FILE} has more than {LARGEST_MANIFEST} bytes; export it again")
        text = (path / MANIFEST_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PackageError(f"{path}: no {MANIFEST_FILE} in it, so not a package; make one with export") from error
    manifest = Manifest.from_json(text, path / MANIFEST_FILE)
    if MODEL_FILE not in manifest.files or TOKENIZER_FILE not in manifest.files:
        raise PackageError(f"{path / MANIFEST_FILE}: damaged manifest (files); export the package again")
    for name in manifest.files:
        if Path(name).name != name or not (path / name).is_file():
            raise PackageError(f"{path}: {name} is missing; the package is incomplete, export it again")
    return Package(path, manifest)


def verify_files(package: Package, *, but: str | None = None, only: str | None = None) -> None:
    """Compare every file with its hash, and look for weights that the graph keeps in other files.

    Args:
        but: the name of a file that is left out. only: of the one that is not.

    Raises:
        PackageError: a file was changed or cannot be read, or the graph's weights are in other files.
    """
    for name, expected in package.manifest.files.items():
        if name == but or only not in (None, name):
            continue
        file = package.path / name
        words = _Words(ELSEWHERE)
        try:
            found = file_hash(file, also=words.look if name == MODEL_FILE else None)
        except OSError as error:
            raise PackageError(f"{file} cannot be read ({error.strerror})") from error
        if found != expected:
            raise PackageError(
                f"{package.path}: {name} differs from its hash in {MANIFEST_FILE}; export the package again"
            )
        if words.found:
            raise PackageError(f"{file} keeps weights in other files, as no package does; export it again")


class _Words:
    """Looks for a word in bytes that come in pieces.

    Protobuf stores strings in one piece, so a graph without the word names no other file: before 1.24, onnxruntime
    reads any for it. That weights spell it by chance takes 2^64 bytes of them.
    """

    def __init__(self, word: bytes) -> None:
        self.word, self.end, self.found = word, b"", False

    def look(self, block: bytes) -> None:
        """Look at the next piece, and at what it makes with the end of the one before."""
        reach = len(self.word) - 1
        self.found = self.found or self.word in self.end + block[:reach] or self.word in block
        self.end = (self.end + block[-reach:])[-reach:]


def clear_leftovers(path: Path) -> None:
    """Remove what a killed `write_package` left beside `path`, and bring back the package that it had moved aside.

    What another process is filling just now is locked, and stays.
    """
    if not path.parent.is_dir():
        return
    named = re.compile(re.escape(f".{path.name}-") + r"[0-9a-f]{8}")
    for partial in sorted({place.with_name(place.name.removesuffix(OLD)) for place in path.parent.iterdir()}):
        if named.fullmatch(partial.name) is None or (partial.exists() and _lock(partial, keep=False) is None):
            continue
        replaced = partial.with_name(partial.name + OLD)
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)


def _lock(directory: Path, *, keep: bool) -> int | None:
    """Lock a directory against `clear_leftovers`, until its descriptor is closed or the process is no more.

    Returns: the descriptor; None where another process has the lock, or the system has no such locks.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    if not keep:
        os.close(descriptor)
    return descriptor


@contextmanager
def write_package(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty sibling directory to fill with a package, as `write_directory` does."""
    with write_directory(path, A_PACKAGE, is_package, force=force) as directory:
        yield directory


@contextmanager
def write_directory(path: Path, kind: str, is_own: Callable[[Path], bool], *, force: bool = False) -> Iterator[Path]:
    """Yield an empty sibling directory to fill; on success it becomes `path`, on any failure it vanishes.

    kind, is_own: what is written, and whether a directory is of that kind, which alone `force` replaces.
    Where the process is killed it stays, and the next to write to `path` removes it.

    Raises:
        ExportError: `path` exists and `force` is not set or it cannot be moved, or the disk is full.
    """
    clear_leftovers(path)
    require_absent(path, force=force, kind=kind, is_own=is_own)
    made = [parent for parent in path.parents if not parent.exists()]
    partial = path.parent / f".{path.name}-{secrets.token_hex(4)}"
    replaced = partial.with_name(partial.name + OLD)
    lock = None
    try:  # from before the first directory is made: Ctrl-C may come at any moment
        partial.mkdir(parents=True)
        lock = _lock(partial, keep=True)
        if path.exists():
            _require_movable(path, replaced)
        yield partial
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ExportError(f"{path}: no space left on the device; free some or change `out`") from error
        raise
    finally:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        if not path.exists():
            for parent in made:
                with suppress(OSError):  # something else has been put there
                    parent.rmdir()


def _require_movable(path: Path, aside: Path) -> None:
    """Raise `ExportError`, before the work, where `path` cannot be moved: a mount point, a layer of an overlay."""
    try:
        path.rename(aside)
        aside.rename(path)
    except OSError as error:
        raise ExportError(f"{path} cannot be replaced ({error.strerror}); choose another `out`") from error


def require_absent(
    path: Path, *, force: bool, kind: str = A_PACKAGE, is_own: Callable[[Path], bool] = is_package
) -> None:
    """Raise `ExportError` where `path` exists and may not be replaced, or cannot be made or written to."""
    for place in (path, *path.parents):
        if place.exists():
            if not place.is_dir():
                raise ExportError(f"{place} is a file, not a directory; choose another `out`")
            break
    if path.exists() and not force:
        raise ExportError(f"{path} exists; use `force` to replace it, or another `out`")
    if path.exists() and any(path.iterdir()) and not is_own(path):
        raise ExportError(f"{path} holds something else than {kind}; `force` will not delete it")
    refused = why_unwritable(path.parent)
    if refused is not None:
        raise ExportError(f"{refused}; choose another `out`")


def why_unwritable(directory: Path) -> str | None:
    """Say why nothing can be written in `directory`, or made above it where it is yet to be; None where it can.

    A file that has no name is made there, which is gone again at once.
    """
    try:
        place = next(place for place in (directory, *directory.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"{directory} cannot be written to ({error.strerror})"


def seal_package(directory: Path, manifest: Manifest) -> None:
    """Write the manifest with the hash of every file in `directory` but the model card."""
    files = {file.name: file_hash(file) for file in sorted(directory.iterdir()) if file.name != CARD_FILE}
    text = dataclasses.replace(manifest, files=files).to_json()
    (directory / MANIFEST_FILE).write_text(text, encoding="utf-8")


def file_hash(path: Path, *, also: Callable[[bytes], object] | None = None) -> str:
    """Return the sha256 of a file, in hexadecimal. also: is given every block that is read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if also is not None:
                also(block)
    return digest.hexdigest()
