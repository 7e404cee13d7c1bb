"""The exported package: one self-contained directory, complete or absent, hashed; and the graph's contract.

The one thing that `export/` and `runtime/` share. Imports neither torch nor onnx.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expe_edge.errors import ExportError, PackageError

#: Raised by one when a reader of one format would misread the other.
FORMAT_VERSION = 2
MANIFEST_FILE = "expe_edge.json"
MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"

#: Bytes of a number in the cache, by dtype.
CACHE_ITEM_BYTES = {"float32": 4, "int8": 1}

#: A dimension is a number, or the name of a symbolic axis.
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (as NumPy names it) and shape of a graph's input or output."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class GraphContract:
    """The inputs and outputs of an exported graph, in order.

    Position n of a row is the n-th token of that row: `position_ids` count from 0. `attention_mask` has 1 for every
    token up to and including the new ones.

    growing_cache: false where past and present are one buffer, written in place: cached keys stand at 0, 1, 2, …, and
        rows of a batch are padded on the right. True where present is past with all new keys appended, those of
        padding too: the mask says which are tokens, and padding may stand anywhere.
    """

    layers: int
    key_value_heads: int
    head_size: int
    vocab_size: int
    cache_dtype: str = "float32"
    growing_cache: bool = False

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Token inputs, then the cache."""
        return (
            TensorSpec("input_ids", "int64", ("batch", "sequence")),
            TensorSpec("attention_mask", "int64", ("batch", "total_sequence")),
            TensorSpec("position_ids", "int64", ("batch", "sequence")),
            *self._cache("past_key_values", "past"),
        )

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Logits, then the cache with the new tokens appended."""
        logits = TensorSpec("logits", "float32", ("batch", "sequence", self.vocab_size))
        return (logits, *self._cache("present", "total_sequence"))

    @property
    def past_names(self) -> tuple[str, ...]:
        """Names of the cache inputs."""
        return tuple(spec.name for spec in self._cache("past_key_values", "past"))

    @property
    def present_names(self) -> tuple[str, ...]:
        """Names of the cache outputs, in the order of `past_names`."""
        return tuple(spec.name for spec in self._cache("present", "total_sequence"))

    @property
    def cache_bytes(self) -> int:
        """Bytes of one token's keys and values, in all layers."""
        return 2 * self.layers * self.key_value_heads * self.head_size * CACHE_ITEM_BYTES[self.cache_dtype]

    def _cache(self, prefix: str, axis: str) -> tuple[TensorSpec, ...]:
        shape: Shape = ("batch", self.key_value_heads, axis, self.head_size)
        return tuple(
            TensorSpec(f"{prefix}.{layer}.{part}", self.cache_dtype, shape)
            for layer in range(self.layers)
            for part in ("key", "value")
        )


@dataclass(frozen=True)
class Manifest:
    """What a package holds, how it was made, and how well it agreed with PyTorch; `expe_edge.json`.

    Attributes:
        model: the model's config as plain data, encoding included.
        contract: the graph's inputs and outputs.
        training_length: N, tokens. context_length: positions that clients should reserve a cache for by default.
        precision: name of the linears' format, or `auto`. linears: the format of every linear by its name.
            embedding: that of the embedding. recipe: all that was asked for. rounding: the precision and block size
            that the weights were trained for; None where they were not.
        positions: `folded` or `inline`. position_code: bits and limbs of the integer codes in the graph; None
            where the encoding has none.
        calibration: source and method, with the ranges, cache scales and smoothing that were measured; None where
            nothing was.
        parity: the validation's figures: maximum absolute differences of logits.
        parts: name, format and bytes of every part of the graph. operators: how often each occurs in the graph, and
            kernels: in what onnxruntime makes of it. requires_onnxruntime: the oldest release that has them.
        corpus: where the training text came from, so that held-out text can be found again.
        files: name to sha256, every file of the package but the manifest.
    """

    model: Mapping[str, Any]
    contract: GraphContract
    training_length: int
    context_length: int
    precision: str
    linears: Mapping[str, str]
    positions: str
    position_code: Mapping[str, int] | None
    calibration: Mapping[str, Any] | None
    parity: Mapping[str, Any]
    corpus: Mapping[str, Any]
    embedding: str
    recipe: Mapping[str, Any]
    parts: Sequence[Mapping[str, Any]]
    operators: Mapping[str, int]
    kernels: Mapping[str, int]
    requires_onnxruntime: str
    created_by: str
    rounding: Mapping[str, Any] | None = None
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Return the manifest as JSON text, closed by the digest of all before."""
        values = self.to_dict()
        return json.dumps({**values, "digest": _digest(values)}, indent=1) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, text: str, where: Path) -> Manifest:
        """Parse a manifest; strict about its keys, clear about its version."""
        try:
            values = json.loads(text)
            version = values["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise PackageError(f"{where}: not a manifest of expe-edge; export the package again") from error
        if isinstance(version, int) and version < FORMAT_VERSION:
            raise PackageError(f"{where}: format version {version}, not {FORMAT_VERSION}; export the package again")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise PackageError(
                f"{where}: format version {version}, newer than {FORMAT_VERSION}, the newest this release reads; "
                "upgrade expe-edge"
            )
        digest = values.pop("digest", None)
        if digest != _digest(values):
            raise PackageError(f"{where}: changed since it was written (its digest differs); export the package again")
        try:
            contract = GraphContract(**values.pop("contract"))
            for name in ("model", "linears", "parity", "corpus", "recipe", "operators", "kernels", "files"):
                if not isinstance(values.get(name, {}), dict):
                    raise TypeError(f"{name} is no mapping")
            return cls(contract=contract, **values)
        except (KeyError, TypeError) as error:
            raise PackageError(f"{where}: damaged manifest ({error}); export the package again") from error


def _digest(values: Mapping[str, Any]) -> str:
    """Return the sha256 of a manifest's content, however it is laid out."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Package:
    """A package on disk whose manifest has been read and whose files have been verified."""

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


def release(version: str) -> tuple[int, ...]:
    """Return major and minor number of a version, for comparing."""
    return tuple(int(part) for part in version.split(".")[:2])


def is_package(path: Path) -> bool:
    """Tell whether `path` has a package's manifest."""
    return (path / MANIFEST_FILE).is_file()


def read_package(path: Path) -> Package:
    """Read the manifest of `path` and verify its format version and the hash of every file.

    Raises:
        PackageError: no package there, a newer format, or a file that is missing or was changed.
    """
    if not path.is_dir():
        raise PackageError(f"{path}: no such package directory")
    try:
        text = (path / MANIFEST_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PackageError(f"{path}: no {MANIFEST_FILE} in it, so not a package; make one with export") from error
    manifest = Manifest.from_json(text, path / MANIFEST_FILE)
    if MODEL_FILE not in manifest.files or TOKENIZER_FILE not in manifest.files:
        raise PackageError(f"{path / MANIFEST_FILE}: damaged manifest (files); export the package again")
    for name, expected in manifest.files.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise PackageError(f"{path}: {name} is missing; the package is incomplete, export it again")
        if file_hash(file) != expected:
            raise PackageError(f"{path}: {name} differs from its hash in {MANIFEST_FILE}; export the package again")
    return Package(path, manifest)


@contextmanager
def write_package(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty sibling directory to fill; on success it becomes `path`, on any failure it vanishes.

    Raises:
        ExportError: `path` exists and `force` is not set, or the disk is full.
    """
    require_absent(path, force=force)
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    replaced = partial.with_name(f"{partial.name}-old")
    try:
        yield partial
        partial.chmod(0o755)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ExportError(f"{path}: no space left on the device; free some or change --out") from error
        raise
    finally:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
        if not path.exists():
            for parent in made:
                with suppress(OSError):  # something else has been put there
                    parent.rmdir()


def require_absent(path: Path, *, force: bool) -> None:
    """Raise `ExportError` where `path` exists and may not be replaced, or cannot be made."""
    for place in (path, *path.parents):
        if place.exists():
            if not place.is_dir():
                raise ExportError(f"{place} is a file, not a directory; choose another --out")
            break
    if path.exists() and not force:
        raise ExportError(f"{path} exists; use --force to replace it, or another --out")
    if path.exists() and any(path.iterdir()) and not is_package(path):
        raise ExportError(f"{path} holds something else than a package; --force will not delete it")


def seal_package(directory: Path, manifest: Manifest) -> None:
    """Write the manifest with the hash of every file in `directory`."""
    files = {file.name: file_hash(file) for file in sorted(directory.iterdir())}
    text = dataclasses.replace(manifest, files=files).to_json()
    (directory / MANIFEST_FILE).write_text(text, encoding="utf-8")


def file_hash(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
