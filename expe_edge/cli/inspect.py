"""`expe-edge inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from expe_edge.cli.output import PATH, require_writable, write_json
from expe_edge.cli.reference import say_reference


@click.command(short_help="Show what a package holds.")
@click.argument("package", type=PATH, required=False)
@click.option("--json", "json_file", type=PATH, help="Write the manifest and the file sizes there.")
def inspect(package: Path | None, json_file: Path | None) -> None:
    """Verify PACKAGE, or the reference model's, and show its sizes by part and format, ranges, positions, operators,
    parity and provenance."""
    require_writable(json_file)
    from rich.console import Console

    from expe_edge.cli.inspection import inspection_tables
    from expe_edge.cli.tables import print_whole
    from expe_edge.package.directory import read_package
    from expe_edge.package.reference import reference_package

    opened = read_package(package or reference_package())
    if package is None:
        say_reference([opened.path])
    console = Console()
    for table in inspection_tables(opened):
        print_whole(table, console)
    sizes = {file.name: file.stat().st_size for file in sorted(opened.path.iterdir())}
    write_json(json_file, {"manifest": opened.manifest.to_dict(), "bytes": sizes})
