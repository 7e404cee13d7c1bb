"""The packages that come with the library: whole, small, and with nothing in them of where they were made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import pytest

from expe_edge.errors import ConfigError
from expe_edge.package.directory import MODEL_FILE, read_package
from expe_edge.package.reference import REFERENCE_PRECISIONS, reference_package

#: Most bytes of each.
LARGEST = {"int8-dynamic": 16_000_000, "int4-weight": 9_000_000}


def strings(value: Any) -> Iterator[str]:
    """Every string in plain data, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from (key, *strings(item))
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


@pytest.mark.parametrize("precision", REFERENCE_PRECISIONS)
def test_a_reference_package_is_whole_and_small(precision: str) -> None:
    package = read_package(reference_package(precision))
    assert package.manifest.precision == precision
    assert package.size <= LARGEST[precision]


@pytest.mark.parametrize("precision", REFERENCE_PRECISIONS)
def test_a_reference_package_names_no_place_of_the_machine_it_was_made_on(precision: str) -> None:
    package = read_package(reference_package(precision))
    assert package.manifest.corpus["sources"] == ["reference/text.jsonl.xz"]
    described = [
        file for file in package.path.glob("*.json") if file != package.tokenizer_path
    ]  # whose words are text's
    assert described
    found = [string for file in described for string in strings(json.loads(file.read_text(encoding="utf-8")))]
    assert not [name for name in found if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()]
    graph = (package.path / MODEL_FILE).read_bytes()
    assert not [folder for folder in (b"/home/", b"/root/", b"/work/", b"/Users/") if folder in graph]


def test_another_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'int8-dynamc'; did you mean 'int8-dynamic'\?"):
        reference_package("int8-dynamc")
