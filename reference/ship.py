"""Puts exported packages of the reference model into the library, without the paths of the machine they were made on.

    python -m reference.ship packages

`packages` is the --out of `expe-edge export`. Each is copied to expe_edge/reference, its manifest naming the text as
reference/README.md makes it, and sealed again.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import click

from expe_edge.package.directory import read_package, seal_package, write_package
from expe_edge.package.reference import REFERENCE_PRECISIONS, reference_package

#: What the manifests call the text.
TEXT = "reference/text.jsonl.xz"


def ship(package: Path, out: Path) -> None:
    """Copy a verified package to `out`, replacing what is there, with `TEXT` for the sources in its manifest."""
    manifest = read_package(package).manifest
    calibration = manifest.calibration and {**manifest.calibration, "sources": [TEXT]}
    named = dataclasses.replace(manifest, corpus={**manifest.corpus, "sources": [TEXT]}, calibration=calibration)
    with write_package(out, force=True) as directory:
        for name in named.files:
            shutil.copyfile(package / name, directory / name)
        seal_package(directory, named)


@click.command()
@click.argument("packages", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(packages: Path) -> None:
    """Ship the packages in PACKAGES."""
    for precision in REFERENCE_PRECISIONS:
        ship(packages / precision, reference_package(precision))
        click.echo(f"{reference_package(precision)}: {read_package(reference_package(precision)).size:,} bytes")


if __name__ == "__main__":
    main()
