"""Kernels of our own for onnxruntime, compiled on the machine that they run on.

`native/` holds the operators MatMulNBits and GroupQueryAttention, and functions of packages' graphs, in C++ for
processors with AVX-512 VNNI. A session that loads their library runs them in place of onnxruntime's own, and of the
functions' chains of nodes, in the graph as it is. `expe-edge build-kernels` compiles it into the user's cache; where it
is not there, damaged, or not for this processor or package, sessions run as ever.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from expe_edge.errors import ConfigError, reason_of
from expe_edge.package.directory import file_hash
from expe_edge.package.manifest import Manifest
from expe_edge.runtime.processor import instructions
from expe_edge.runtime.user_caches import kept_in, require_private

#: The directory of libraries, or `OFF`.
VARIABLE = "EXPE_EDGE_KERNELS"
#: What is compiled, and what it computes in onnxruntime's graphs.
SOURCES = Path(__file__).parent.parent / "native"
OPERATORS = ("MatMulNBits", "GroupQueryAttention")
#: Extensions of the processor that it is compiled for, by Linux's names, and the compilers' flags for them.
NEEDED = {
    "avx512f": "-mavx512f",
    "avx512bw": "-mavx512bw",
    "avx512vl": "-mavx512vl",
    "avx512dq": "-mavx512dq",
    "avx512_vnni": "-mavx512vnni",
}
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", *NEEDED.values())
#: Compilers that are looked for where the environment's `CXX` names none.
COMPILERS = ("c++", "g++", "clang++")
#: Seconds after which a compiler is given up.
PATIENCE = 300


@dataclass(frozen=True)
class Kernels:
    """Compiled libraries in a directory of the user's. Each is named by its sources' hash and its own."""

    directory: Path

    def library(self, manifest: Manifest) -> Path | None:
        """Return the library for a package, its hash verified; None where there is none that it can use.

        A portable package has none: its products become MatMulNBits in onnxruntime alone, and in a graph that does not
        import the operator's domain, operators of a library hide those that onnxruntime makes besides.
        """
        if not any(operator in manifest.operators for operator in OPERATORS):
            return None
        try:
            require_private(self.directory)  # first: most users have built none
            if missing():
                return None
            for path in sorted(self.directory.glob(f"{source_hash()}-*.so")):
                if path.stem.partition("-")[2] == file_hash(path):
                    return path
        except OSError:  # not there, another user's, or unreadable
            pass
        return None

    def build(self) -> Path:
        """Compile the library for this machine, and return it.

        Raises:
            ConfigError: no compiler, one that fails, a processor without the instructions, another system than Linux,
                or a directory that others may write to. OSError: it cannot be written.
        """
        require_possible()
        command = compiler()
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_private(self.directory)
        with tempfile.TemporaryDirectory(prefix=".draft-", dir=self.directory) as place:
            made = Path(place, "library.so")
            _compile(command, made)
            _require_loadable(made)
            library = self.directory / f"{source_hash()}-{file_hash(made)}.so"
            made.replace(library)
        for other in set(self.directory.glob(f"{source_hash()}-*.so")) - {library}:
            other.unlink(missing_ok=True)
        return library


def kernels_at(where: str | Path | None = None) -> Kernels | None:
    """Return the libraries in the directory `where`; None where it is `OFF`.

    where: None for what the environment's `EXPE_EDGE_KERNELS` says, or else a directory among the user's caches.
    """
    directory = kept_in(where, VARIABLE, "kernels")
    return None if directory is None else Kernels(directory)


def missing() -> list[str]:
    """Return the extensions that the library needs and a processor of this machine lacks."""
    return sorted(set(NEEDED) - instructions())


def require_possible() -> None:
    """Raise `ConfigError` where no library can be made that runs here."""
    if platform.system() != "Linux":
        raise ConfigError(f"kernels are built on Linux alone, this is {platform.system()}; onnxruntime's own are used")
    if missing():
        raise ConfigError(f"this processor lacks {', '.join(missing())}; onnxruntime's own kernels are used")


def source_hash() -> str:
    """Return a hash of all that a library is made of: the sources and the flags."""
    made_of = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(SOURCES.iterdir()):
        made_of.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return made_of.hexdigest()


def compiler() -> list[str]:
    """Return the command that compiles C++: the environment's `CXX`, or the first of `COMPILERS`.

    Raises:
        ConfigError: there is none.
    """
    command = shlex.split(os.environ.get("CXX", ""))
    names = [command[0]] if command else COMPILERS
    found = next((path for path in map(shutil.which, names) if path is not None), None)
    if found is None:
        raise ConfigError(f"no C++ compiler ({', '.join(names)}); install g++ or clang++, or name one in CXX")
    return [found, *command[1:]]


def _compile(command: list[str], made: Path) -> None:
    command = [*command, *FLAGS, *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(made)]
    try:
        done = subprocess.run(  # noqa: S603  # the user's own compiler
            command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"{command[0]} cannot compile the kernels ({reason_of(error)}); name another in CXX"
        ) from error
    if done.returncode != 0 or not made.is_file():
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit code {done.returncode}"]
        raise ConfigError(f"{command[0]} cannot compile the kernels ({errors[0]}); name another in CXX")


def _require_loadable(library: Path) -> None:
    """Raise `ConfigError` for a library that onnxruntime does not take."""
    try:
        ort.SessionOptions().register_custom_ops_library(str(library))
    except Exception as error:  # onnxruntime's exceptions share no narrower base
        raise ConfigError(f"onnxruntime {ort.__version__} does not load the kernels ({reason_of(error)})") from error
