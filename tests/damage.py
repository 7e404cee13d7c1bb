"""Ways to damage the files of a checkpoint or a package, and names that messages list."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENCODINGS = "alibi, expe, exqpe, none, relative, rotary, sinusoidal"


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Return what changes the bytes of one file of a directory."""

    def apply(directory: Path) -> None:
        (directory / name).write_bytes(change((directory / name).read_bytes()))

    return apply


def remove(name: str) -> Callable[[Path], None]:
    """Return what removes one file of a directory."""
    return lambda directory: (directory / name).unlink()


def set_json(name: str, **changes: Any) -> Callable[[Path], None]:
    """Return what changes entries of a JSON file of a directory."""
    return rewrite(name, lambda data: json.dumps({**json.loads(data), **changes}).encode())
