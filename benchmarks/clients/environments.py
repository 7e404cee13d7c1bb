"""Where clients run: this Python, one with another onnxruntime, and node with its packages, made once and kept."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

from benchmarks.clients.running import ROOT, Program
from expe_edge.runtime.user_caches import user_caches

#: Where environments are kept unless told otherwise.
CACHE = user_caches() / "expe-edge" / "clients"
#: Programs in JavaScript, with what they need.
NODE = Path(__file__).with_name("programs") / "node"
#: Runs no scripts of packages: onnxruntime-node's would fetch libraries for GPUs.
NPM_INSTALL = ("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock")


class MissingError(Exception):
    """A client cannot run here; the message says what is missing."""


def this_python(program: str, distribution: str, *, speaks_text: bool = False) -> Program:
    """Return a program for the Python that runs this.

    Raises:
        MissingError: `distribution` is not installed.
    """
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError as error:
        raise MissingError(f"{distribution} is not installed") from error
    return Program(python_command(sys.executable, program), version, speaks_text)


def python_command(python: str, program: str) -> list[str]:
    """Return the command by which a Python runs a module of `programs`."""
    return [python, "-m", f"benchmarks.clients.programs.{program}"]


def oldest_onnxruntime() -> str:
    """Return the oldest release of onnxruntime that pyproject.toml allows."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (oldest,) = re.findall(r'"onnxruntime>=([\d.]+)"', text)
    return str(oldest)


def other_python(program: str, onnxruntime: str, cache: Path = CACHE) -> Program:
    """Return a program for a Python with NumPy and that release of onnxruntime alone.

    Raises:
        MissingError: it cannot be installed.
    """
    directory = cache / f"onnxruntime-{onnxruntime}"
    complete = directory / "complete"
    python = directory / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not complete.exists():
        venv.create(directory, with_pip=True, clear=True)
        _run([str(python), "-m", "pip", "install", "--quiet", "numpy", f"onnxruntime=={onnxruntime}"])
        complete.touch()
    version = _run([str(python), "-c", "import onnxruntime; print(onnxruntime.__version__)"]).strip()
    return Program(python_command(str(python), program), version)


def node(program: str, package: str, cache: Path = CACHE, *, install: bool = True) -> Program:
    """Return a program for node, with the packages that programs/node/package.json names.

    Raises:
        MissingError: node or npm is not there, or the packages cannot be installed, or may not be.
    """
    if shutil.which("node") is None:
        raise MissingError("node is not installed")
    directory = cache / "node"
    complete = directory / "complete"
    wanted = (NODE / "package.json").read_text(encoding="utf-8")
    if not complete.exists() or complete.read_text(encoding="utf-8") != wanted:
        if not install:
            raise MissingError("node's packages are not installed; `make clients` installs them")
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copy(NODE / "package.json", directory)
        _run([*NPM_INSTALL, "--prefix", str(directory)])
        complete.write_text(wanted, encoding="utf-8")
    for file in NODE.glob("*.mjs"):  # imports are looked for beside the file
        shutil.copy(file, directory)
    described = json.loads((directory / "node_modules" / package / "package.json").read_text(encoding="utf-8"))
    return Program(["node", str(directory / program)], described["version"])


def _run(command: list[str]) -> str:
    """Run a command; return what it printed.

    Raises:
        MissingError: it is not there, or fails.
    """
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except OSError as error:
        raise MissingError(f"{command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip().splitlines() or [f"code {error.returncode}"]
        raise MissingError(f"{' '.join(command[1:4])} failed: {said[-1]}") from error
