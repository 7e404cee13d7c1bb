"""What decoding gains from weights in pages of 2 MB, in onnxruntime's kernels and in those that are built here.

    python -m benchmarks.huge_pages --threads 2 package/int8-weight package/int4-weight

Every figure is of a new process, because luck decides where memory lies. All ways take turns, a first one of which does
not count. Linux with glibc 2.35 or newer alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np

from expe_edge.runtime.kernels import Kernels
from expe_edge.runtime.threads import default_threads
from expe_edge.runtime.user_caches import OFF
from expe_edge.speed.apart import Apart
from expe_edge.speed.measuring import quartiles
from expe_edge.speed.timed import TimedPackage

#: What glibc reads when a process begins: whether to ask for such pages in all that it allocates.
TUNABLES, ASKED = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
#: Kernels, and whether glibc asks. Kernels that are built here ask for themselves.
WAYS = {"onnxruntime": (OFF, ""), "onnxruntime, asked": (OFF, ASKED), "own": (None, ""), "own, asked": (None, ASKED)}


def step_ms(package: Path, kernels: str, tunables: str, threads: int, steps: int) -> float:
    """Return the milliseconds of a decode step at depth 0 in a new process."""
    os.environ[TUNABLES] = tunables
    with Apart(TimedPackage, package, threads, "cpu", kernels) as process:
        process.call("decode", 0, steps)
        return 1e3 * float(process.call("decode", 0, steps).seconds)


@click.command()
@click.argument("packages", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--turns", default=7, show_default=True)
@click.option("--steps", default=48, show_default=True)
@click.option("--threads", default=default_threads, type=int, show_default="one for each core that may be used")
def main(packages: tuple[Path, ...], turns: int, steps: int, threads: int) -> None:
    """Print, as JSON lines, quartiles of a step's milliseconds, and of the first way's over each in the same turn."""
    with TemporaryDirectory() as built:
        Kernels(Path(built)).build()
        for path in packages:
            times = np.array(
                [
                    [step_ms(path, kernels or built, tunables, threads, steps) for kernels, tunables in WAYS.values()]
                    for _ in range(1 + turns)
                ]
            )[1:]
            for way, ms in zip(WAYS, times.T, strict=True):
                found = {"milliseconds": quartiles(ms), "ratio": quartiles(times[:, 0] / ms)}
                print(json.dumps({"package": str(path), "kernels": way, **found}), flush=True)


if __name__ == "__main__":
    main()
