"""The reference model's card, and how its packages get into the library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expe_edge.package.directory import read_package
from expe_edge.runtime import Completion, Generator
from reference.card import FIGURES, PAGE, PARTS, reads_as_python, samples_text, shown
from reference.ship import TEXT, ship


@pytest.mark.parametrize(
    ("prompt", "text", "reason", "reads"),
    [
        ("def f(x):", "\n    return x\n", "end_of_text", True),
        ("def f(x):", "\n    return x", "end_of_text", True),
        ("def f(x):", "\n    return (x\n", "end_of_text", False),
        ("def f(x):", "\n    y = 1\n    return (x,\n            y", "length", True),
        ("def f(x):", "\n    return (x,\n            y", "length", False),
        ("def f(x):", "\n    y = 1\n    try:\n        g()\n    exc", "length", True),
        ("def f(x):", "\n    y = 1\n    if x:\n        'unfin", "length", True),
        ("def f(x):", '\n    """Text that\n    goes on', "length", False),
        ("def f(x):", '\n    """Text."""\n    goes.on', "length", True),
        ("def f(x):", "\n    return (x\n    return x\n    x", "length", False),
        ("def f(x):", "\n    'unfinished\n    x", "length", False),
        ("def f(x):", "\n  a = 1\n      b = 2\n   c", "length", False),
        ("def f(x):", "\nreturn x\n\n", "length", False),
        ("def f(x):", " return x + 1 + 1 + 1", "length", False),
        ("", "", "end_of_text", False),
    ],
)
def test_what_reads_as_python(prompt: str, text: str, reason: str, reads: bool) -> None:
    assert reads_as_python(prompt, Completion(text=text, finish_reason=reason)) == reads


def test_samples_are_counted() -> None:
    sample = {"prompt": "a", "greedy": " = 1", "sampled": " = 2"}
    text = samples_text({"texts": [{**sample, "reads_as_python": True}, {**sample, "reads_as_python": False}]})
    assert text.startswith("**1 of 2**")
    assert text.count("a = 1") == text.count("a = 2") == 2


@pytest.mark.parametrize("part", PARTS)
def test_the_page_shows_the_figures(part: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    text = shown(json.loads(FIGURES.read_text(encoding="utf-8")))[part]
    assert f"<!-- {part} -->\n{text}\n<!-- /{part} -->" in page, "run `python -m reference.card`"


def test_what_is_shipped_is_the_same_model_and_names_no_path(packages: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second replaces the first
        ship(packages / "int8-static", tmp_path / "shipped")
    before, after = read_package(packages / "int8-static"), read_package(tmp_path / "shipped")
    assert Path(before.manifest.corpus["sources"][0]).is_absolute()
    assert before.manifest.calibration is not None
    assert after.manifest.calibration == {**before.manifest.calibration, "sources": [TEXT]}
    assert after.manifest.corpus == {**before.manifest.corpus, "sources": [TEXT]}
    assert after.manifest.files == before.manifest.files
    assert Generator.load(after.path).generate(["the"], max_new_tokens=4)[0].tokens
