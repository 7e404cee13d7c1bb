"""Where clients run: this Python, one with another onnxruntime that is made once and kept, and Node.js."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

from benchmarks.clients.running import ROOT, Program
from benchmarks.node.environment import MissingError, programs, version_of
from expe_edge.runtime.user_caches import user_caches

#: Where environments are kept unless told otherwise.
CACHE = user_caches() / "expe-edge" / "clients"


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


def node(program: str, package: str) -> Program:
    """Return a program of `benchmarks/node` for Node.js; package: the npm package that it tries.

    Raises:
        MissingError: Node.js or npm is not there, or packages cannot be installed.
    """
    return Program(["node", str(programs() / program)], version_of(package))


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
