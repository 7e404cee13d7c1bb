"""What a study keeps on disk: found figures beside what was asked, so that another question is not answered by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_record(path: Path, asked: dict[str, Any], **found: Any) -> None:
    """Write plain data that answers what is `asked`, whole or not at all."""
    partial = path.with_name(f".{path.name}")
    text = json.dumps({"asked": asked, **found}, indent=2)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def read_record(path: Path) -> dict[str, Any] | None:
    """Return what `write_record` wrote; None where there is nothing, or it is being written."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record
