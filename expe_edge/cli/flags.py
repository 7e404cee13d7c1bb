"""From the library's names to the command line's: messages say `block_size`, which here is --block-size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from expe_edge.errors import NAMED


class Setting(click.Option):
    """An option that the library has another name for than the command: `setting`."""

    def __init__(self, *arguments: Any, setting: str, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.setting = setting


def with_flags(message: str, commands: Mapping[str, click.Command], running: str | None) -> str:
    """Return a message of the library with an option's flag in place of every setting that the option stands for.

    The options of the command that is running go before those of the others, which are meant where it says how a model
    should have been trained, or is to be exported. Whatever else is in backticks is left as it is.
    """
    flags: dict[str, str] = {}
    for name in sorted(commands, key=lambda name: name == running):
        flags |= flags_of(commands[name])
    return NAMED.sub(lambda match: flags.get(match[1], match[0]), message)


def flags_of(command: click.Command) -> dict[str, str]:
    """Return the flags of a command's options by all their names: of the flag, of its parameter, of a `Setting`."""
    flags: dict[str, str] = {}
    for option in command.params:
        if isinstance(option, click.Option):
            flags |= {flag[2:].replace("-", "_"): flag for flag in (*option.opts, *option.secondary_opts)}
            flags[str(option.name)] = option.opts[0]
        if isinstance(option, Setting):
            flags[option.setting] = option.opts[0]
    return flags
