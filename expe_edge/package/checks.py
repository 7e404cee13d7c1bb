"""Kinds and bounds of what is read from a file: each check takes a value by its name and raises `ValueError`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from expe_edge.errors import shown

#: Raises `ValueError` unless the value of that name is what it must be.
Check = Callable[[str, object], None]


def _kind(words: str, holds: Callable[[object], bool]) -> Check:
    def check(name: str, value: object) -> None:
        if not holds(value):
            raise ValueError(f"{name} is {shown(value)}, not {words}")

    return check


TEXT = _kind("text", lambda value: isinstance(value, str))
NUMBER = _kind("a number", lambda value: type(value) is float or (type(value) is int and abs(value) < 2**63))
BOOLEAN = _kind("true or false", lambda value: type(value) is bool)
VERSION = _kind("a version", lambda value: isinstance(value, str) and re.match(r"\d+\.\d+", value) is not None)
MAPPING = _kind("a mapping", lambda value: isinstance(value, dict))
NOTHING = _kind("null", lambda value: value is None)
LIST = _kind("a list", lambda value: isinstance(value, list | tuple))


#: Lists and mappings within each other; those of this project have five at most.
DEEPEST = 32


def shallow(name: str, value: object) -> None:
    """Nothing nested beyond `DEEPEST`, which no reader or writer of it need fear."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            item
            for inside in level
            for item in (inside.values() if isinstance(inside, dict) else inside if isinstance(inside, list) else ())
        ]
        if not level:
            return
    raise ValueError(f"{name} is nested more than {DEEPEST} deep")


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
            check(f"{name}[{shown(key)}]", item)

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
            raise ValueError(f"{name} has the unknown entry {shown(unknown[0])}")

    return checked
