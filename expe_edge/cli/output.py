"""What the commands share: options, paths and counts among them, and JSON written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from expe_edge.cli.flags import Setting
from expe_edge.errors import ConfigError
from expe_edge.package.directory import why_unwritable
from expe_edge.results import finite

Command = TypeVar("Command", bound=Callable[..., Any])

#: A path option or argument; whether it exists is for the command to say, in its own words.
PATH = click.Path(path_type=Path)
#: The options of commands that read text, and of those that compute several models.
TEXT_FIELD = click.option("--text-field", default="text", show_default=True, help="Field of JSON lines and parquet.")
THREADS = click.option("--threads", type=int, help="Threads of all packages together.  [default: every core]")


def sources(flag: str, help_text: str) -> Callable[[Command], Command]:
    """Return the repeatable option of a command by which text is named."""
    return click.option(flag, cls=Setting, setting="sources", multiple=True, metavar="PATH", help=help_text)


def is_given(name: str) -> bool:
    """Tell whether the running command was given an option, by its parameter's name, in place of the default."""
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT


#: Formats of `--plot`.
PLOT_SUFFIXES = (".png", ".svg")


def write_json(path: Path | None, value: Any) -> None:
    """Write `value` to `path`, where one is given; numbers that are not finite, which JSON does not have, as null."""
    if path is None:
        return
    text = json.dumps(finite(value), indent=2, allow_nan=False)
    require_writable(path)
    path.write_text(text + "\n", encoding="utf-8")


def report_written(*files: Path | None) -> None:
    """Name the files that were asked for."""
    for file in files:
        if file is not None:
            click.echo(f"wrote {file}", err=True)


def require_writable(path: Path | None) -> None:
    """Raise `ConfigError` before long work where `path` could not be written after it; nothing is left there."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is not a directory; create it, or change where {path.name} goes")
    if path.is_dir():
        raise ConfigError(f"{path} is a directory; name a file in it")
    refused = _why_unwritable(path) if path.exists() else why_unwritable(path.parent)
    if refused is not None:
        raise ConfigError(f"{refused}; change where {path.name} goes")


def _why_unwritable(path: Path) -> str | None:
    """The same for what exists. A pipe or a device is not opened: opening may wait, or be taken for all there is."""
    try:
        if path.is_file():
            path.open("ab").close()
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        return f"{path} cannot be written ({error.strerror})"
    return None


def require_counts(**options: int | None) -> None:
    """Raise `ConfigError` unless each option that is given, by its name without dashes, is 1 or more."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise ConfigError(f"--{name} is {value}; at least 1")


def require_plot(path: Path | None) -> None:
    """Raise `ConfigError` before long work where no plot could be drawn to `path` after it."""
    require_writable(path)
    if path is not None and path.suffix not in PLOT_SUFFIXES:
        raise ConfigError(f"--plot {path}: expected a name that ends in {' or '.join(PLOT_SUFFIXES)}")
    if path is not None and find_spec("matplotlib") is None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
