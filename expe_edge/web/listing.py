"""What the page knows of a package: the part of its manifest that runs it, in the page's own words.

    python -m expe_edge.web.listing PACKAGE

prints it as JSON, for what runs the page's model elsewhere (`page/src/node.ts`).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expe_edge.errors import PackageError
from expe_edge.package.contract import GraphContract
from expe_edge.package.directory import MODEL_FILE, TOKENIZER_FILE, Package, open_manifest, verify_files
from expe_edge.package.manifest import Manifest
from expe_edge.runtime.memory import far_heads
from expe_edge.runtime.session import PackageSession
from expe_edge.runtime.user_caches import OFF
from expe_edge.web.choice import has_float_weights

#: Files of a package that the page loads.
FILES = (MODEL_FILE, TOKENIZER_FILE)
#: Numbers of a cache that the page knows.
CACHES = ("float32", "int8")
#: By how much logits may differ between two machines whose sums have another order, in units of max(1, largest / 16).
FLOAT_TOLERANCE = 2e-3


def package_info(path: Path, name: str | None = None, note: str = "") -> dict[str, Any]:
    """Return what `page/src/model/package.ts` calls `PackageInfo`, of a package whose every file is verified.

    Raises:
        PackageError: a missing, damaged or newer package, one that onnxruntime cannot open, or one for a GPU.
    """
    contract = open_manifest(path).manifest.contract
    if contract.cache_dtype not in CACHES or contract.whole_buffer:
        raise PackageError(f"{path} is for another place than browsers; export it with a `cache` of float32 or int8")
    session = PackageSession.load(path, kernels=OFF)
    package = session.package
    verify_files(package)
    manifest = package.manifest
    called = name or path.resolve().name
    return {
        "name": called,
        "directory": re.sub(r"[^\w.-]+", "-", called),
        "precision": manifest.precision,
        "note": note,
        "trainingLength": manifest.training_length,
        "reach": manifest.model["max_position_embeddings"],
        "endOfText": manifest.model.get("eos_token_id"),
        "contract": _contract(manifest, session.keeps_last),
        "floatWeights": has_float_weights(manifest),
        "files": _files(package),
        "selfTest": None if manifest.self_test is None else _self_test(manifest, manifest.self_test),
    }


def _contract(manifest: Manifest, keeps_last: bool) -> dict[str, Any]:
    contract: GraphContract = manifest.contract
    groups = [group for group in contract.groups if group.window]
    lengths = filter(None, contract.window_lengths)
    tensors = zip(contract.past_names, contract.present_names, contract.cache_groups, strict=True)
    return {
        "vocabSize": contract.vocab_size,
        "headSize": contract.head_size,
        "cacheType": contract.cache_dtype,
        "growing": contract.growing_cache,
        "cache": [
            {
                "past": past,
                "present": present,
                "heads": group.heads,
                "window": groups.index(group) if group.window else None,
            }
            for past, present, group in tensors
        ],
        "windows": [{"tokens": group.window, "lengths": name} for group, name in zip(groups, lengths, strict=True)],
        "keepsLast": keeps_last,
        "heads": far_heads(manifest),
    }


def _files(package: Package) -> dict[str, dict[str, Any]]:
    hashes = package.manifest.files
    return {name: {"bytes": (package.path / name).stat().st_size, "sha256": hashes[name]} for name in FILES}


def _self_test(manifest: Manifest, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A quantized graph may round an activation to another level elsewhere; it stays as near as it is to its source."""
    largest = max(map(abs, recorded["logits"]))
    from_source = max(manifest.parity["prefill_max"], manifest.parity["decode_max"])
    return {**recorded, "tolerance": max(FLOAT_TOLERANCE * max(1.0, largest / 16), from_source)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(package_info(Path(sys.argv[1]))) + "\n")
