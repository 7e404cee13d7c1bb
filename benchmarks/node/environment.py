"""Node.js with the npm packages of `package-lock.json`, installed once and kept.

They go into a directory of their own among temporary files, or `EXPE_EDGE_NODE`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent
PLACE = Path(os.environ.get("EXPE_EDGE_NODE") or Path(tempfile.gettempdir(), f"expe-edge-node-{os.getuid()}"))
#: Runs no scripts of packages: onnxruntime-node's would fetch libraries for GPUs. Where the registry cannot be reached,
#: it says so soon.
INSTALL = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1", "--fetch-timeout=30000")


class MissingError(Exception):
    """What is asked for cannot run here; the message says what is missing."""


def programs() -> Path:
    """Return a directory with the programs of `SOURCES`, in one that holds the npm packages which they import.

    Raises:
        MissingError: there is no Node.js or npm, or packages cannot be installed; it is tried once.
    """
    found = _programs()
    if isinstance(found, str):
        raise MissingError(found)
    return found


@cache
def _programs() -> Path | str:
    """The same, or why there are none."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return "Node.js and npm are not installed"
    lock = (SOURCES / "package-lock.json").read_bytes()
    place = PLACE / hashlib.sha256(lock).hexdigest()[:16]
    with locked(place):
        if not (place / "installed").exists():
            for name in ("package.json", "package-lock.json"):
                shutil.copyfile(SOURCES / name, place / name)
            try:
                subprocess.run(INSTALL, cwd=place, capture_output=True, text=True, timeout=240, check=True)
            except subprocess.SubprocessError as error:
                return f"npm packages cannot be installed: {error}"
            (place / "installed").touch()
        scripts = sorted(SOURCES.glob("*.mjs"))
        version = hashlib.sha256(b"".join(script.read_bytes() for script in scripts)).hexdigest()[:16]
        copied = place / version
        if not copied.exists():
            partial = place / f".{version}"
            partial.mkdir(exist_ok=True)
            for script in scripts:
                shutil.copyfile(script, partial / script.name)
            partial.rename(copied)
    return copied


def version_of(package: str) -> str:
    """Return the release of an npm package that is installed for `programs`.

    Raises:
        MissingError: as `programs` does.
    """
    described = json.loads((programs().parent / "node_modules" / package / "package.json").read_text(encoding="utf-8"))
    return str(described["version"])


class locked:  # noqa: N801  # a context manager, as `suppress` is
    """Keeps other processes out of what is done in a directory, which is made."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "lock"

    def __enter__(self) -> None:
        self.file = self.path.open("w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self.file.close()


def run_node(script: Path, order: Mapping[str, Any], *, timeout: float = 200) -> dict[str, Any]:
    """Run a script that takes an order on its standard input and answers on its standard output, both JSON."""
    done = subprocess.run(
        ["node", str(script)], input=json.dumps(order), capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{script.name}: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
