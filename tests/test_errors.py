"""Messages: one line, whatever they quote."""

from __future__ import annotations

import pytest

from expe_edge.errors import WIDEST_VALUE, ExPEEdgeError, one_line, shown, unknown_name


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("café 日本 🙂", "café 日本 🙂"),
        ("a\nb\r\x1b[2J", r"a\nb\r\x1b[2J"),
        ("\u2028\u202e\ufeff\ud800", r"\u2028\u202e\ufeff\ud800"),
    ],
)
def test_what_breaks_a_line_or_drives_a_terminal_is_escaped(text: str, line: str) -> None:
    assert one_line(text) == line
    assert str(ExPEEdgeError(text)) == line


def test_an_unknown_name_is_shortened() -> None:
    assert unknown_name("how", "x" * 10_000, ["add"]) == f"unknown how {'x' * WIDEST_VALUE!r}; available: add"


def test_a_value_is_shortened() -> None:
    wide: list[object] = ["x" * 100] * 100
    for _ in range(20):
        wide = [wide] * 20
    assert len(shown(wide)) <= WIDEST_VALUE
    assert shown([1, "a"]) == "[1, 'a']"
