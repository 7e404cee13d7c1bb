"""What a package says of itself: `expe_edge.json`, versioned and closed by its own digest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expe_edge.errors import PackageError
from expe_edge.package.contract import GraphContract

#: Raised by one when a reader of one format would misread the other.
FORMAT_VERSION = 2
MANIFEST_FILE = "expe_edge.json"


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


def release(version: str) -> tuple[int, ...]:
    """Return major and minor number of a version, for comparing."""
    return tuple(int(part) for part in version.split(".")[:2])
