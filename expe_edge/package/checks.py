"""Kinds and bounds of what is read from a file: each check takes a value by its name and raises `ValueError`."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping

#: Raises `ValueError` unless the value of that name is what it must be.
Check = Callable[[str, object], None]


def _kind(words: str, holds: Callable[[object], bool]) -> Check:
    def check(name: str, value: object) -> None:
        if not holds(value):
            raise ValueError(f"{name} is {reprlib.repr(value)}, not {words}")

    return check


TEXT = _kind("text", lambda value: isinstance(value, str))
NUMBER = _kind("a number", lambda value: type(value) in (int, float))
BOOLEAN = _kind("true or false", lambda value: type(value) is bool)
VERSION = _kind("a version", lambda value: isinstance(value, str) and re.match(r"\d+\.\d+", value) is not None)
MAPPING = _kind("a mapping", lambda value: isinstance(value, dict))
LIST = _kind("a list", lambda value: isinstance(value, list | tuple))


def whole(low: int, high: int) -> Check:
    """A whole number of these bounds, both included."""
    return _kind(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def one_of(*names: str) -> Check:
    """One of these texts."""
    return _kind(f"one of {', '.join(names)}", lambda value: value in names)


def optional(check: Check) -> Check:
    """None, or what `check` allows."""

    def checked(name: str, value: object) -> None:
        if value is not None:
            check(name, value)

    return checked


def list_of(check: Check, length: int | None = None) -> Check:
    """A list of nothing else, of that length where one is given."""

    def checked(name: str, value: object) -> None:
        LIST(name, value)
        assert isinstance(value, list | tuple)
        if length is not None and len(value) != length:
            raise ValueError(f"{name} has {len(value)} values, not {length}")
        for index, item in enumerate(value):
            check(f"{name}[{index}]", item)

    return checked


def mapping_of(check: Check) -> Check:
    """A mapping, from text, to nothing else."""

    def checked(name: str, value: object) -> None:
        MAPPING(name, value)
        assert isinstance(value, dict)
        for key, item in value.items():
            check(f"{name}[{reprlib.repr(key)}]", item)

    return checked


def record(
    entries: Mapping[str, Check], sometimes: Mapping[str, Check] | None = None, *, closed: bool = False
) -> Check:
    """A mapping with each of these entries, and those of `sometimes` or not; a `closed` one has no others."""
    known = {**entries, **(sometimes or {})}

    def checked(name: str, value: object) -> None:
        MAPPING(name, value)
        assert isinstance(value, dict)
        for key, check in known.items():
            if key in value:
                check(f"{name}.{key}", value[key])
            elif key in entries:
                raise ValueError(f"{name} has no {key}")
        unknown = sorted(set(value) - set(known))
        if closed and unknown:
            raise ValueError(f"{name} has the unknown entry {reprlib.repr(unknown[0])}")

    return checked
