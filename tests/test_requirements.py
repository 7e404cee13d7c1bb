"""constraints-lowest.txt, which `make test-lowest` installs, is the lower ends of what pyproject.toml asks for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import expe_edge

ROOT = Path(expe_edge.__file__).parents[1]
#: torch's is not tested; genai's needs a newer onnxruntime than the oldest; no test runs the others.
NOT_TESTED = {
    *("torch", "onnxruntime-genai", "ruff", "mypy", "types-pyyaml", "build"),
    *("llama-cpp-python", "gguf", "ctranslate2", "onnxruntime-gpu"),
}


def requirements() -> list[str]:
    """Every requirement of pyproject.toml but those of one extra for another."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings a reader of TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (one for extra in project["optional-dependencies"].values() for one in extra)
    return [one for one in (*project["dependencies"], *extras) if not one.startswith("expe-edge[")]


def test_the_lowest_versions_are_the_lower_ends_of_the_ranges() -> None:
    found = [re.match(r"([\w-]+)(?:\[\w+\])?(?:>=([\d.]+))?", one) for one in requirements()]
    ends = {each[1]: each[2] for each in found if each and each[1].lower() not in NOT_TESTED}

    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    lowest = dict(line.split("==") for line in lines if not line.startswith(("#", "torch==")))

    assert ends == lowest
