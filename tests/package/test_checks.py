"""Checks of kinds and bounds: what each allows, and how it names what it does not."""

from __future__ import annotations

import math

import pytest

from expe_edge.package.checks import (
    BOOLEAN,
    LIST,
    MAPPING,
    NUMBER,
    TEXT,
    VERSION,
    Check,
    list_of,
    mapping_of,
    one_of,
    optional,
    record,
    whole,
)

ALLOWED: list[tuple[Check, object]] = [
    *((TEXT, value) for value in ("", "text")),
    *((NUMBER, value) for value in (0, -1.5, math.inf, math.nan)),
    *((BOOLEAN, value) for value in (True, False)),
    *((VERSION, value) for value in ("1.22", "1.23rc1", "1.23.0+cpu")),
    *((whole(1, 3), value) for value in (1, 2, 3)),
    (one_of("a", "b"), "b"),
    (optional(TEXT), None),
    (optional(TEXT), "text"),
    (list_of(NUMBER), []),
    (list_of(NUMBER, 2), (1, 2.5)),
    (mapping_of(TEXT), {"a": "b"}),
    (record({"a": TEXT}), {"a": "b", "c": 3}),
    (record({"a": TEXT}, closed=True), {"a": "b"}),
    (record({"a": TEXT}, {"b": BOOLEAN}, closed=True), {"a": "b"}),
    (record({"a": TEXT}, {"b": BOOLEAN}, closed=True), {"a": "b", "b": True}),
]
REFUSED: list[tuple[Check, object, str]] = [
    (TEXT, 3, "x is 3, not text"),
    (NUMBER, True, "x is True, not a number"),
    (NUMBER, "1", "x is '1', not a number"),
    (BOOLEAN, 1, "x is 1, not true or false"),
    (VERSION, "newest", "x is 'newest', not a version"),
    (VERSION, 1.22, "x is 1.22, not a version"),
    (MAPPING, [], "x is [], not a mapping"),
    (LIST, "text", "x is 'text', not a list"),
    *((whole(1, 3), value, f"x is {value}, not a whole number from 1 to 3") for value in (0, 4, 2.0, True, None)),
    (one_of("a", "b"), "c", "x is 'c', not one of a, b"),
    (one_of("a", "b"), ["a"], "x is ['a'], not one of a, b"),
    (optional(TEXT), 3, "x is 3, not text"),
    (list_of(NUMBER, 2), [1], "x has 1 values, not 2"),
    (list_of(list_of(TEXT)), [["a"], ["b", 3]], "x[1][1] is 3, not text"),
    (mapping_of(NUMBER), {"a": "b"}, "x['a'] is 'b', not a number"),
    (record({"a": TEXT}), {"b": "a"}, "x has no a"),
    (record({"a": record({"b": TEXT})}), {"a": {"b": 3}}, "x.a.b is 3, not text"),
    (record({"a": TEXT}, closed=True), {"a": "b", "c": 3}, "x has the unknown entry 'c'"),
    (record({"a": TEXT}, {"b": BOOLEAN}), {"a": "b", "b": 3}, "x.b is 3, not true or false"),
]


@pytest.mark.parametrize(("check", "value"), ALLOWED)
def test_what_is_allowed(check: Check, value: object) -> None:
    check("x", value)


@pytest.mark.parametrize(("check", "value", "message"), REFUSED)
def test_what_is_refused_is_named(check: Check, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=r"^x") as caught:
        check("x", value)

    assert str(caught.value) == message


def test_a_value_of_any_size_makes_a_short_message() -> None:
    with pytest.raises(ValueError, match=r"^x is 'aaa") as caught:
        whole(0, 1)("x", "a" * 10**6)

    assert len(str(caught.value)) < 120
