"""The one family of errors that a user can cause, and the sentences they are made of.

Every error says what is wrong, the value received, what is allowed and which setting changes it, by its name in Python,
in backticks: `block_size`. The command line prints it as one line, with its own option in place of such a name, and
exits with code 2; library callers catch `ExPEEdgeError`.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Callable, Iterable
from contextvars import ContextVar

#: A setting in a message.
NAMED = re.compile(r"`(\w+)`")
#: Characters of a value that a message quotes.
WIDEST_VALUE = 200
#: Characters of a library's message that one of ours repeats.
LONGEST_REASON = 300
#: What becomes of a message where it is shown: as it is, but that the command line names its options in it.
wording: ContextVar[Callable[[str], str]] = ContextVar("wording", default=str)


class ExPEEdgeError(Exception):
    """Something the caller can mend. The message is one clear line, whatever names and values it quotes."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(ExPEEdgeError):
    """A setting that is unknown, out of range, or inconsistent with another."""


class CorpusError(ExPEEdgeError):
    """Text that is missing, unreadable, or too short for what is asked of it."""


class CheckpointError(ExPEEdgeError):
    """A training checkpoint that is missing, damaged, or not of this project."""


class PackageError(ExPEEdgeError):
    """An exported package that is missing, damaged, or of another format version."""


class ExportError(ExPEEdgeError):
    """An export that cannot be made, or that failed its validation."""


class GenerationError(ExPEEdgeError):
    """A prompt or a sampling setting that the generator cannot serve."""


def one_line(text: str) -> str:
    """Return text with every character that breaks a line or drives a terminal written as its escape."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def reason_of(error: BaseException) -> str:
    """Return what a library's error says, on one line and not beyond `LONGEST_REASON` characters."""
    return one_line(" ".join(str(error).split()))[:LONGEST_REASON] or type(error).__name__


def shown(value: object) -> str:
    """Return a value as Python writes it, shortened in the middle and at the end where it is long."""
    return reprlib.repr(value)[:WIDEST_VALUE]


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that `name` is unknown, suggest the nearest of `known`, and list them all."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"unknown {kind} {name[:WIDEST_VALUE]!r}; {hint}available: {', '.join(names)}"
