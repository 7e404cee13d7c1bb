"""What a package says of itself: `expe_edge.json`, versioned and closed by its own digest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expe_edge.errors import PackageError
from expe_edge.package.checks import (
    MAPPING,
    NUMBER,
    TEXT,
    VERSION,
    Check,
    list_of,
    mapping_of,
    optional,
    record,
    shallow,
    whole,
)
from expe_edge.package.contract import BOUNDS, LONGEST, WIDEST, GraphContract

#: Raised by one when a reader of one format would misread the other.
FORMAT_VERSION = 2
MANIFEST_FILE = "expe_edge.json"
#: The most bytes of one; those of `auto` with hundreds of layers take a hundredth.
LARGEST_MANIFEST = 2**26

_COUNT, _LENGTH, _ID = whole(0, 2**63 - 1), whole(1, LONGEST), whole(0, WIDEST - 1)
_TOKEN = optional(_ID)
_RANGE = list_of(NUMBER, 2)
_CALIBRATION = record(
    {
        "method": TEXT,
        "windows": _COUNT,
        "window_tokens": _LENGTH,
        "sources": list_of(TEXT),
        "weights": TEXT,
    },
    sometimes={
        "ranges": mapping_of(_RANGE),
        "smoothing": mapping_of(NUMBER),
        "cache_scales": list_of(record({"key": _RANGE, "value": _RANGE})),
        "choice": record({"kl": NUMBER, "size": _COUNT}),
        "head_windows": record({"windows": list_of(_COUNT), "tokens": _COUNT, "loss": NUMBER, "kl": NUMBER}),
    },
)
_CORPUS = record({"sources": list_of(TEXT), "text_field": TEXT}, sometimes={"held_out": list_of(TEXT)}, closed=True)

#: What every entry but the contract must be, as far as anything reads it.
ENTRIES: dict[str, Check] = {
    "model": record(
        {
            "vocab_size": BOUNDS["vocab_size"],
            "hidden_size": whole(1, WIDEST),
            "num_hidden_layers": BOUNDS["layers"],
            "num_attention_heads": whole(1, WIDEST),
            "num_key_value_heads": BOUNDS["key_value_heads"],
            "intermediate_size": whole(1, WIDEST),
            "positional": TEXT,
            "positional_parameters": record({}, sometimes={"where": TEXT, "content_heads": whole(0, WIDEST)}),
            "training_length": _LENGTH,
            "max_position_embeddings": _LENGTH,
            "eos_token_id": _TOKEN,
        }
    ),
    "training_length": _LENGTH,
    "context_length": _LENGTH,
    "precision": TEXT,
    "linears": mapping_of(TEXT),
    "positions": TEXT,
    "position_code": optional(record({"bits": whole(1, 24), "limbs": whole(1, 24)})),
    "calibration": optional(_CALIBRATION),
    "parity": record({"tokens": _COUNT, "prefill_max": NUMBER, "decode_max": NUMBER, "mean_kl": NUMBER}),
    "corpus": _CORPUS,
    "embedding": TEXT,
    "recipe": MAPPING,
    "parts": list_of(record({"part": TEXT, "format": TEXT, "bytes": _COUNT})),
    "operators": mapping_of(_COUNT),
    "kernels": mapping_of(_COUNT),
    "requires_onnxruntime": VERSION,
    "created_by": TEXT,
    "files": mapping_of(TEXT),
}
_ROUNDING = optional(record({"precision": TEXT, "block_size": optional(_COUNT)}, closed=True))
_SELF_TEST = optional(record({"prompt": list_of(_ID), "tokens": list_of(_ID), "logits": list_of(NUMBER)}, closed=True))
_MANIFEST = record(ENTRIES, sometimes={"rounding": _ROUNDING, "self_test": _SELF_TEST})


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
        self_test: `prompt`, the greedy `tokens` that the exporter continued it with, one by one, and the `logits` of
            these; None where an earlier release exported the package.
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
    self_test: Mapping[str, Any] | None = None
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
        """Parse a manifest; strict about its keys, what they hold and that they agree, clear about its version."""
        try:
            values = json.loads(text)
            shallow("manifest", values)
            version = values["format_version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
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
            manifest = cls(contract=contract, **values)
            _MANIFEST("manifest", values)
            manifest._require_agreement()
        except (KeyError, TypeError, ValueError) as error:
            raise PackageError(f"{where}: damaged manifest ({error}); export the package again") from error
        return manifest

    def _require_agreement(self) -> None:
        """Raise `ValueError` where the model's sizes are not the contract's."""
        model, contract = self.model, self.contract
        agreed = {
            "num_hidden_layers": contract.layers,
            "num_key_value_heads": contract.key_value_heads,
            "hidden_size": contract.head_size * model["num_attention_heads"],
            "vocab_size": contract.vocab_size,
            "training_length": self.training_length,
        }
        for name, size in agreed.items():
            if model[name] != size:
                raise ValueError(f"model.{name} is {model[name]}, but {size} by what else it says")
        if self.self_test is not None:
            prompt, tokens, logits = (self.self_test[name] for name in ("prompt", "tokens", "logits"))
            if not prompt or not tokens or len(tokens) != len(logits) or max(*prompt, *tokens) >= contract.vocab_size:
                raise ValueError("self_test is no prompt and as many tokens of the vocabulary as logits")


def _digest(values: Mapping[str, Any]) -> str:
    """Return the sha256 of a manifest's content, however it is laid out."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def release(version: str) -> tuple[int, int]:
    """Return major and minor number of a version, for comparing: (1, 23) of 1.23rc1 and of 1.23.0+cpu."""
    match = re.match(r"(\d+)(?:\.(\d+))?", version)
    return (int(match[1]), int(match[2] or 0)) if match else (0, 0)
