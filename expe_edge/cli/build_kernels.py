"""`expe-edge build-kernels`."""

from __future__ import annotations

import time

import click


@click.command("build-kernels", short_help="Compile faster kernels for this processor.")
@click.option("--kernels", metavar="DIRECTORY", help="Where to keep them; by default among the user's caches.")
def build_kernels(kernels: str | None) -> None:
    """Compile attention, products with weights in blocks (int8-weight, int4-weight) and the chains of nodes that
    packages have as functions, whose source comes with expe-edge, by this machine's C++ compiler: $CXX, c++, g++ or
    clang++. Packages are opened with them from then on.

    They need Linux and a processor with AVX-512 VNNI. EXPE_EDGE_KERNELS names another directory for all commands, or
    turns them off.
    """
    from expe_edge.errors import ConfigError
    from expe_edge.runtime.kernels import compiler, kernels_at

    chosen = kernels_at(kernels)
    if chosen is None:
        raise ConfigError("`kernels` is off; name a directory, or unset EXPE_EDGE_KERNELS")
    began = time.perf_counter()
    library = chosen.build()
    seconds = time.perf_counter() - began
    click.echo(f"{library}: {library.stat().st_size / 1e3:.0f} kB, by {' '.join(compiler())} in {seconds:.1f} s")
