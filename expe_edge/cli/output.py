"""What the commands share: paths and counts as options, and JSON written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from expe_edge.errors import ConfigError

#: A path option or argument; whether it exists is for the command to say, in its own words.
PATH = click.Path(path_type=Path)
#: Formats of `--plot`.
PLOT_SUFFIXES = (".png", ".svg")


def write_json(path: Path | None, value: Any) -> None:
    """Write `value` to `path`, where one is given."""
    if path is None:
        return
    require_writable(path)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def report_written(*files: Path | None) -> None:
    """Name the files that were asked for."""
    for file in files:
        if file is not None:
            click.echo(f"wrote {file}", err=True)


def require_writable(path: Path | None) -> None:
    """Raise `ConfigError` before long work where `path` could not be written after it."""
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is not a directory; create it, or change where {path.name} goes")
    if path is not None and path.is_dir():
        raise ConfigError(f"{path} is a directory; name a file in it")


def require_counts(**options: int) -> None:
    """Raise `ConfigError` unless each option, by its name without dashes, is 1 or more."""
    for name, value in options.items():
        if value < 1:
            raise ConfigError(f"--{name} is {value}; at least 1")


def require_plot(path: Path | None) -> None:
    """Raise `ConfigError` before long work where no plot could be drawn to `path` after it."""
    require_writable(path)
    if path is not None and path.suffix not in PLOT_SUFFIXES:
        raise ConfigError(f"--plot {path}: expected a name that ends in {' or '.join(PLOT_SUFFIXES)}")
