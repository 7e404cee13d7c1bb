"""What the values of settings must be: checks that every dataclass and config of settings shares."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from expe_edge.errors import ConfigError, shown, unknown_name


def is_number(value: object) -> bool:
    """Tell whether a value is a finite number, and no integer beyond them."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def is_unicode(text: str) -> bool:
    """Tell whether text can be written as UTF-8: it holds no half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def all_are(kind: Callable[[object], bool], values: object) -> bool:
    """Tell whether `values` is a tuple of nothing else."""
    return isinstance(values, tuple) and all(map(kind, values))


#: What the values of a setting must be, by the annotation of its field, in words and as a test.
KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "bool": ("true or false", lambda value: type(value) is bool),
    "int": ("a whole number", lambda value: type(value) is int),
    "float": ("a number", is_number),
    "str": ("text", lambda value: isinstance(value, str)),
    "float | tuple[float, ...]": (
        "a number, or a list of numbers",
        lambda value: is_number(value) or all_are(is_number, value),
    ),
    "tuple[int, ...]": (
        "a whole number, or a list of them",
        lambda value: all_are(lambda item: type(item) is int, value),
    ),
    "tuple[str, ...]": ("text, or a list of it", lambda value: all_are(lambda item: isinstance(item, str), value)),
    "Mapping[str, Any]": ("a mapping", lambda value: isinstance(value, Mapping)),
}


def require_kinds(settings: Any, change: str = "") -> None:
    """Raise `ConfigError` unless every field of a dataclass holds what its annotation says; others are left alone.

    change: what the message says at its end, of the field `{name}`.
    """
    for field in dataclasses.fields(settings):
        require_kind(field.name, getattr(settings, field.name), str(field.type), change.format(name=field.name))


def require_kind(name: str, value: object, annotation: str, change: str = "") -> None:
    """Raise `ConfigError` unless a value is what an annotation says, where `KINDS` or `None` tells what that is.

    change: what the message says at its end.
    """
    if value is None and annotation.endswith(" | None"):
        return
    words, holds = KINDS.get(annotation.removesuffix(" | None"), ("", None))
    if holds is not None and not holds(value):
        raise ConfigError(f"{name} is {shown(value)}; it must be {words}{change}")


def require_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise `ConfigError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(unknown_name(name, value, allowed))


def require_positive(**values: float) -> None:
    """Raise `ConfigError` unless every value is above zero."""
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(f"{name} is {value}; it must be above 0")
