"""Changing the manifest of a package as its maker would, so that what else is checked can be seen to be."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from expe_edge.package.manifest import MANIFEST_FILE


def read_manifest(package: Path) -> dict[str, Any]:
    """The manifest as plain data."""
    values: dict[str, Any] = json.loads((package / MANIFEST_FILE).read_text(encoding="utf-8"))
    return values


def edit_manifest(package: Path, without: str = "", **changes: Any) -> None:
    """Change entries of the manifest, or remove one, and make its digest anew."""
    values = {**read_manifest(package), **changes}
    for name in ("digest", without):
        values.pop(name, None)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    (package / MANIFEST_FILE).write_text(json.dumps({**values, "digest": digest}), encoding="utf-8")
