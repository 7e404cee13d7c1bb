"""What opening a package takes: imports, hashes, onnxruntime, with and without optimised graphs that are kept.

    python -m benchmarks.startup expe_edge/reference/int8-dynamic

Every figure is of a new process. All ways take turns, so that a busy machine slows all of them alike; a first turn is
not counted. Files are in the system's cache. Processor time is that of all threads. Bytes are resident when the package
is open: private ones, and those of files, which processes share.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

import click

from expe_edge.runtime.threads import default_threads
from expe_edge.speed.measuring import quartiles

#: Run in a new interpreter with a way, a package, a directory for kept graphs and a number of threads.
MEASURED = """
import json, sys, time
from pathlib import Path

began = time.perf_counter()
import numpy, onnxruntime
libraries = time.perf_counter()
import expe_edge.runtime
ours = time.perf_counter()
from expe_edge.package.directory import open_manifest, verify_files
from expe_edge.runtime import Generator, PackageSession
from expe_edge.runtime.graph_cache import GraphCache
from expe_edge.runtime.opening import session_options

way, path, kept, threads = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
package = open_manifest(path)
started, processor = time.perf_counter(), time.process_time()
if way == "hashes":
    verify_files(package)
elif way == "onnxruntime alone":
    held = onnxruntime.InferenceSession(
        str(package.model_path), session_options(threads), providers=["CPUExecutionProvider"]
    )
elif way == "load":
    held = PackageSession.load(path, threads=threads)
elif way.startswith("load, "):
    held = PackageSession.load(path, threads=threads, cache=GraphCache(kept))
else:
    held = Generator.load(path, threads=threads, graph_cache=kept)
seconds, processor = time.perf_counter() - started, time.process_time() - processor
from expe_edge.speed.measuring import STATUS, status_bytes
sizes = {name: status_bytes(name) for name in ("RssAnon", "RssFile") if STATUS.is_file()}
print(json.dumps({
    "import of libraries": 1e3 * (libraries - began), "import of ours": 1e3 * (ours - libraries),
    "milliseconds": 1e3 * seconds, "processor_milliseconds": 1e3 * processor,
    "private_bytes": sizes.get("RssAnon"), "file_bytes": sizes.get("RssFile"),
}))
"""
#: The fourth writes what the last two read.
WAYS = ("hashes", "onnxruntime alone", "load", "load, keeping", "load, kept", "generator, kept")


def measure(way: str, package: Path, kept: Path, threads: int) -> dict[str, Any]:
    """Return what a new process takes that goes this way."""
    command = [sys.executable, "-c", MEASURED, way, str(package), str(kept), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@click.command()
@click.argument("packages", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--turns", default=7, show_default=True)
@click.option("--threads", default=default_threads, type=int, show_default="one for each core that may be used")
def main(packages: tuple[Path, ...], turns: int, threads: int) -> None:
    """Print, as JSON lines, medians and quartiles of imports, and of every way of opening each package."""
    found: dict[tuple[Path, str], list[dict[str, Any]]] = {(path, way): [] for path in packages for way in WAYS}
    with TemporaryDirectory() as directory:
        for turn in range(1 + turns):
            for index, path in enumerate(packages):
                kept = Path(directory, f"{index}-{turn}")
                for way in WAYS:
                    found[path, way].append(measure(way, path, kept, threads))
                rmtree(kept)
    every = [one for runs in found.values() for one in runs[1:]]
    for name in ("import of libraries", "import of ours"):
        print(json.dumps({"way": name, "milliseconds": quartiles([one[name] for one in every])}))
    for (path, way), runs in found.items():
        values = {name: [one[name] for one in runs[1:]] for name in ("milliseconds", "processor_milliseconds")}
        sizes = {name: runs[-1][name] for name in ("private_bytes", "file_bytes")}
        print(json.dumps({"package": str(path), "way": way} | {k: quartiles(v) for k, v in values.items()} | sizes))


if __name__ == "__main__":
    main()
