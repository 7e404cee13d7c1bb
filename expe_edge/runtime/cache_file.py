"""What a context holds, as a file: a line of JSON, the tokens, keys and values, and the hash of all before it."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from expe_edge.errors import GenerationError
from expe_edge.package.checks import TEXT, optional, record, whole
from expe_edge.package.contract import CACHE_ITEM_BYTES, LONGEST
from expe_edge.package.directory import MODEL_FILE, TOKENIZER_FILE
from expe_edge.package.manifest import Manifest
from expe_edge.runtime.cache import Cache
from expe_edge.runtime.history import History
from expe_edge.runtime.leftovers import is_abandoned
from expe_edge.runtime.storage import Array

#: Begins every file, with the version of its format.
MAGIC = b"expe-edge cache 1\n"
#: The most bytes of the line of JSON.
LONGEST_HEADER = 4096
HASH_BYTES = hashlib.sha256().digest_size

_HEADER = record(
    {
        "model": TEXT,
        "tokenizer": TEXT,
        "held": whole(0, LONGEST),
        "dropped": whole(0, 2**62),
        "digest": TEXT,
        "window": optional(record({"size": whole(1, LONGEST), "sinks": whole(0, LONGEST)}, closed=True)),
    },
    closed=True,
)


def write_cache_file(path: Path, manifest: Manifest, cache: Cache) -> None:
    """Write what a cache of one row holds, tied to the graph and the tokenizer of a package.

    Raises:
        GenerationError: the file cannot be written.
    """
    history, window = cache.histories[0], cache.window
    header = {
        **_identity(manifest),
        "held": len(history.ids),
        "dropped": history.dropped,
        "digest": history.digest.hex(),
        "window": None if window is None else vars(window),
    }
    partial = path.parent / f".{path.name}-{secrets.token_hex(4)}"
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _remove_abandoned(path)
        with partial.open("xb") as file:
            digest = hashlib.sha256()
            for piece in _pieces(header, history, cache.tensors()):
                digest.update(piece)
                file.write(piece)
            file.write(digest.digest())
        partial.replace(path)
    except OSError as error:
        raise GenerationError(f"{path}: the cache cannot be written ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes have left beside a file; what others are writing just now stays."""
    for left in path.parent.glob(f".{glob.escape(path.name)}-{'[0-9a-f]' * 8}"):
        with suppress(FileNotFoundError):
            if is_abandoned(left):
                left.unlink()


def read_cache_file(path: Path, manifest: Manifest, cache: Cache) -> None:
    """Fill a cache of one row with what `write_cache_file` wrote; it stays as it is where that fails.

    Raises:
        GenerationError: no such file, a damaged one, or one of another package or window.
    """
    try:
        with path.open("rb") as file:
            tensors, history = _read(path, file, manifest, cache)
    except OSError as error:
        raise GenerationError(f"{path}: the cache cannot be read ({error.strerror})") from error
    cache.restore(tensors, history)


def _pieces(header: dict[str, Any], history: History, tensors: Sequence[Array]) -> Iterator[bytes | memoryview]:
    yield MAGIC
    yield json.dumps(header).encode() + b"\n"
    yield history.ids.astype("<i8").tobytes()
    for tensor in tensors:
        for head in tensor:  # contiguous, so that nothing is copied
            yield memoryview(head).cast("B") if head.size else b""


def _read(path: Path, file: BufferedReader, manifest: Manifest, cache: Cache) -> tuple[list[Array], History]:
    if file.readline(len(MAGIC)) != MAGIC:
        raise GenerationError(f"{path} is not a cache of expe-edge; delete it or name another file")
    line = file.readline(LONGEST_HEADER)
    header = _parsed(path, line)
    for name, hashed in _identity(manifest).items():
        if header[name] != hashed:
            raise GenerationError(
                f"{path} holds what another package has read: its {name} is not this one's; name another file"
            )
    window = None if cache.window is None else vars(cache.window)
    if header["window"] != window:
        raise GenerationError(f"{path} was written with `window` {_said(header['window'])}, not {_said(window)}")
    held, contract = header["held"], cache.contract
    shapes = [(group.heads, group.seen(held), contract.head_size) for group in contract.cache_groups]
    content = sum(map(math.prod, shapes)) * CACHE_ITEM_BYTES[contract.cache_dtype]
    size = len(MAGIC) + len(line) + 8 * held + content + HASH_BYTES
    if path.stat().st_size != size or held > cache.capacity:  # before anything is allocated
        raise _damaged(path)
    digest = hashlib.sha256(MAGIC + line)
    ids = _read_array(file, np.empty(held, dtype="<i8"))
    digest.update(ids.data)
    tensors = [_read_array(file, np.empty(shape, dtype=contract.cache_dtype)) for shape in shapes]
    for tensor in tensors:
        digest.update(tensor.data)
    if file.read() != digest.digest():
        raise _damaged(path)
    if ids.size and not (ids.min() >= 0 and ids.max() < contract.vocab_size):
        raise _damaged(path)
    dropped, block = header["dropped"], 0 if cache.window is None else cache.window.block
    if dropped and not (block and dropped % block == 0):
        raise _damaged(path)
    history = History(ids)
    history.dropped, history.digest = dropped, bytes.fromhex(header["digest"])
    return tensors, history


def _parsed(path: Path, line: bytes) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(line)
        _HEADER("header", header)
        bytes.fromhex(header["digest"])
    except (ValueError, RecursionError) as error:
        raise _damaged(path) from error
    return header


def _read_array(file: BufferedReader, array: Array) -> Array:
    """Fill a new array from a file."""
    if array.size:
        file.readinto(array.data.cast("B"))
    return array


def _identity(manifest: Manifest) -> dict[str, str]:
    """Hashes of what decides how text becomes keys and values."""
    return {"model": manifest.files[MODEL_FILE], "tokenizer": manifest.files[TOKENIZER_FILE]}


def _said(window: dict[str, int] | None) -> str:
    return "none" if window is None else f"{window['size']} and `sinks` {window['sinks']}"


def _damaged(path: Path) -> GenerationError:
    return GenerationError(f"{path}: a damaged cache; delete it or name another file")
