"""Packages on an Arm processor, which qemu stands in for, beside the same here.

    python -m benchmarks.arm setup
    python -m benchmarks.arm compare demo/package/*

`setup` makes `.arm/` (hundreds of MB) of Debian's packages and wheels, on a Debian of any release; it installs nothing.
"""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.arm.comparing import PROCESSORS, compare
from benchmarks.arm.system import DIRECTORY, System
from expe_edge.errors import ConfigError


@click.group()
def main() -> None:
    """Make an aarch64 system, and run packages in it."""


@main.command()
@click.option("--directory", type=click.Path(path_type=Path), default=DIRECTORY, show_default=True)
def setup(directory: Path) -> None:
    """Make the system."""
    System(directory.absolute()).make()


@main.command(name="compare")
@click.argument("packages", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--processors", default=",".join(PROCESSORS), show_default=True, help="As qemu names them.")
def compare_command(packages: tuple[Path, ...], processors: str) -> None:
    """Print how far PACKAGES' logits are from those computed here, and how many greedy tokens are the same."""
    system = System.find()
    if system is None:
        raise ConfigError("there is no aarch64 system; run `python -m benchmarks.arm setup`")
    print("| package | processor | mean KL | logits differ by | same tokens |\n|---|---|---|---|---|")
    for processor in processors.split(","):
        for path, found in zip(packages, compare(system, packages, processor), strict=True):
            same = f"{found.same} of {found.written}"
            print(f"| {path.name} | {processor} | {found.kl:.2g} | {found.largest:.2g} | {same} |")


if __name__ == "__main__":
    main()
