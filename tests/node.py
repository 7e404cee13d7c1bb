"""Node.js for tests and benchmarks: clients of packages, and a browser, from npm packages that are installed once.

They go into a directory of their own among temporary files, or `EXPE_EDGE_NODE_TESTS`; what is missing skips the test.
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

import pytest

SOURCES = Path(__file__).parent / "web" / "node"
PLACE = Path(os.environ.get("EXPE_EDGE_NODE_TESTS") or Path(tempfile.gettempdir(), f"expe-edge-node-{os.getuid()}"))
#: Where the registry cannot be reached, it says so soon.
INSTALL = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1", "--fetch-timeout=30000")
BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


def node_scripts() -> Path:
    """The scripts of `SOURCES`, beside the npm packages that they import."""
    found = _scripts()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@cache
def _scripts() -> Path | str:
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


def run_script(name: str, order: Mapping[str, Any], *, timeout: float = 200) -> dict[str, Any]:
    """Run one of the scripts; return its answer."""
    return run_node(node_scripts() / name, order, timeout=timeout)


def run_node(script: Path, order: Mapping[str, Any], *, timeout: float = 200) -> dict[str, Any]:
    """Run a script that takes an order on its standard input and answers on its standard output, both JSON."""
    done = subprocess.run(
        ["node", str(script)], input=json.dumps(order), capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{script.name}: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def browser() -> str:
    """The system's Chromium or Chrome."""
    found = os.environ.get("CHROMIUM") or next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        pytest.skip("there is no Chromium on the PATH")
    return found


@cache
def page() -> Path:
    """The directory of the built page, as `built_page` returns it."""
    node_scripts()  # without npm there is none
    from expe_edge.errors import ConfigError
    from expe_edge.web.building import CACHE, built_page

    os.environ.setdefault(CACHE, str(PLACE / "page"))  # what tests build is nothing for the user
    with locked(PLACE / "page"):
        try:
            return built_page()
        except ConfigError as error:
            pytest.skip(str(error))
