"""The one family of errors that a user can cause, and the sentences they are made of.

Every error says what is wrong, the value received, what is allowed and which option changes it. The command
line prints it as one line and exits with code 2; library callers catch `ExPEEdgeError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ExPEEdgeError(Exception):
    """Something the caller can mend. The message is one clear line."""


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


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that `name` is unknown, suggest the nearest of `known`, and list them all."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"unknown {kind} {name!r}; {hint}available: {', '.join(names)}"
