"""Which nodes of a package onnxruntime-gpu runs on a GPU, asked of it where there is none.

    VENV/bin/pip install onnxruntime-gpu tokenizers click rich
    VENV/bin/python -m benchmarks.cuda.assignment package/float16-cuda

The environment VENV has onnxruntime-gpu in place of onnxruntime. NVIDIA's libraries are not needed: `stand_in.c` is
compiled in their place, a device that runs no kernel. onnxruntime optimises the graph and assigns its nodes as on any.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import click
import onnxruntime as ort

from expe_edge.errors import ConfigError
from expe_edge.runtime import PackageSession

SOURCE = Path(__file__).with_name("stand_in.c")
#: Libraries of NVIDIA's: those that the provider names, and one that it opens when it needs it.
LIBRARIES, OPENED = re.compile(r"\[(lib(?:cu|nv)\w*\.so\.\d+)\]"), "libcudnn.so.9"
#: Tells the second process where it is.
VARIABLE = "EXPE_EDGE_STAND_IN"


def build(directory: Path) -> None:
    """Compile the stand-in, under the names of all libraries that onnxruntime's CUDA provider asks for.

    Raises:
        ConfigError: this onnxruntime has no such provider, or there is no compiler.
    """
    provider = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not provider.is_file():
        raise ConfigError(f"onnxruntime {ort.__version__} has no CUDA provider; run this where onnxruntime-gpu is")
    imported = subprocess.run(["nm", "-D", "--undefined-only", provider], capture_output=True, text=True, check=True)
    names = {line.split()[-1].partition("@")[0] for line in imported.stdout.splitlines()}
    defined = set(re.findall(r"(\w+)\([^;{]*\) *\{", SOURCE.read_text(encoding="utf-8")))
    empty = sorted(name for name in names - defined if re.match(r"(__)?(cu[A-Z]|cuda|cublas|curand|cufft)", name))
    wrapper = directory / "stand_in.c"
    lines = [f'#include "{SOURCE}"', *(f"int {name}(void) {{ return 0; }}" for name in empty)]
    wrapper.write_text("\n".join(lines) + "\n", encoding="utf-8")
    library = directory / "stand_in.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-w", str(wrapper), "-o", str(library)], check=True)
    needed = subprocess.run(["readelf", "-d", provider], capture_output=True, text=True, check=True).stdout
    for name in {*LIBRARIES.findall(needed), OPENED}:
        (directory / name).symlink_to(library)


def assigned(path: Path) -> dict[str, Counter[str]]:
    """Return how many nodes of each operator every execution provider takes of a package.

    Raises:
        PackageError, GenerationError: as `PackageSession.load`.
    """
    ort.preload_dlls = lambda **_: None  # of NVIDIA's own libraries
    session = PackageSession.load(path, device="cuda").session
    found: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        found.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    return found


@click.command()
@click.argument("packages", nargs=-1, required=True, type=click.Path(path_type=Path))
def main(packages: tuple[Path, ...]) -> None:
    """Print what every provider takes of PACKAGES."""
    if VARIABLE in os.environ:
        for path in packages:
            print(f"{path}, onnxruntime {ort.__version__}")
            for provider, operators in assigned(path).items():
                listed = ", ".join(f"{count} {name}" for name, count in operators.most_common())
                print(f"  {provider}: {listed}")
        return
    with tempfile.TemporaryDirectory() as directory:
        build(Path(directory))
        environment = os.environ | {VARIABLE: directory, "LD_LIBRARY_PATH": directory}
        arguments = [sys.executable, "-m", "benchmarks.cuda.assignment", *map(str, packages)]
        sys.exit(subprocess.run(arguments, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
