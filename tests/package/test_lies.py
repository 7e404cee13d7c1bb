"""Packages that lie: hashes and digest are right, what the manifest says is not. One line, and nothing allocated."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expe_edge.errors import PackageError
from expe_edge.package.contract import BOUNDS, GraphContract
from expe_edge.package.directory import read_package
from expe_edge.package.manifest import LARGEST_MANIFEST, MANIFEST_FILE, release
from tests.manifests import edit_manifest, read_manifest

#: Changes to the contract, and what is said of each.
CONTRACTS: list[tuple[dict[str, Any], str]] = [
    ({"layers": 10**6}, "layers is 1000000, not a whole number from 1 to 1024"),
    ({"layers": 0}, "layers is 0, not a whole number from 1 to 1024"),
    ({"layers": 2.0}, "layers is 2.0, not a whole number from 1 to 1024"),
    ({"layers": "2"}, "layers is '2', not a whole number from 1 to 1024"),
    ({"key_value_heads": -2}, "key_value_heads is -2, not a whole number from 1 to 1024"),
    ({"head_size": 10**6}, "head_size is 1000000, not a whole number from 1 to 4096"),
    ({"vocab_size": 2**40}, "vocab_size is 1099511627776, not a whole number from 1 to 1048576"),
    ({"cache_dtype": "float64"}, "cache_dtype is 'float64', not one of float32, float16, int8"),
    ({"cache_dtype": None}, "cache_dtype is None, not one of float32, float16, int8"),
    ({"growing_cache": 1}, "growing_cache is 1, not true or false"),
    (
        {"layers": 1024, "key_value_heads": 1024, "head_size": 4096},
        "a token takes 34359738368 bytes of cache, more than 67108864",
    ),
    ({"layers": 3}, "model.num_hidden_layers is 2, but 3 by what else it says"),
    ({"key_value_heads": 4}, "model.num_key_value_heads is 2, but 4 by what else it says"),
    ({"head_size": 32}, "model.hidden_size is 64, but 128 by what else it says"),
    ({"vocab_size": 301}, "model.vocab_size is 300, but 301 by what else it says"),
]


def refusal(package: Path) -> str:
    """Return what is said of a manifest's content, within a second."""
    began = time.perf_counter()
    with pytest.raises(PackageError) as caught:
        read_package(package)
    assert time.perf_counter() - began < 1
    before, after = f"{package}/{MANIFEST_FILE}: damaged manifest (", "); export the package again"
    message = str(caught.value)
    assert message.startswith(before), message
    assert message.endswith(after)
    assert "\n" not in message
    return message[len(before) : -len(after)]


def test_entries_nested_so_deep_that_a_reader_runs_out_of_stack(own_package: Path) -> None:
    deep: list[Any] = []
    for _ in range(350):
        deep = [deep]
    edit_manifest(own_package, model={**read_manifest(own_package)["model"], "more": deep})

    with pytest.raises(PackageError, match=r"not a manifest of expe-edge; export the package again$"):
        read_package(own_package)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"where": ["key"]}, "where is ['key'], not text"),
        ({"where": None}, "where is None, not text"),
        ({"content_heads": "x"}, "content_heads is 'x', not a whole number from 0 to 1048576"),
        ({"content_heads": -1}, "content_heads is -1, not a whole number from 0 to 1048576"),
    ],
    ids=str,
)
def test_settings_of_the_encoding_that_the_runtime_reads(
    own_package: Path, entry: dict[str, Any], message: str
) -> None:
    model = read_manifest(own_package)["model"]
    edit_manifest(own_package, model={**model, "positional_parameters": {**model["positional_parameters"], **entry}})

    assert refusal(own_package) == f"manifest.model.positional_parameters.{message}"


def test_figures_beyond_floats(own_package: Path) -> None:
    parity = read_manifest(own_package)["parity"]
    edit_manifest(own_package, parity={**parity, "mean_kl": 10**400})

    assert refusal(own_package).startswith("manifest.parity.mean_kl is 1000")


@pytest.mark.parametrize(("changes", "message"), CONTRACTS)
def test_contract_out_of_bounds(own_package: Path, changes: dict[str, Any], message: str) -> None:
    edit_manifest(own_package, contract={**read_manifest(own_package)["contract"], **changes})

    assert refusal(own_package) == message


def test_sizes_that_agree_with_each_other_are_bounded_all_the_same(own_package: Path) -> None:
    """The million layers of a million that made the generator allocate until memory ended."""
    sizes = {"num_hidden_layers": 10**6, "num_key_value_heads": 10**6, "num_attention_heads": 10**6}
    edit_manifest(
        own_package,
        contract={"layers": 10**6, "key_value_heads": 10**6, "head_size": 10**6, "vocab_size": 300},
        model={**read_manifest(own_package)["model"], **sizes, "hidden_size": 10**12},
    )

    assert refusal(own_package) == "layers is 1000000, not a whole number from 1 to 1024"


@pytest.mark.parametrize("name", BOUNDS)
def test_every_field_of_a_contract_has_bounds(name: str) -> None:
    good: dict[str, Any] = {"layers": 1, "key_value_heads": 1, "head_size": 8, "vocab_size": 300}

    with pytest.raises(ValueError, match=f"^{name} is None, not "):
        GraphContract(**{**good, name: None})


#: Entries and paths in them, values put there, and what is said.
ENTRIES: list[tuple[str, list[str | int], object, str]] = [
    ("training_length", [], 10**12, "manifest.training_length is 1000000000000, not a whole number from 1 to 16777216"),
    ("training_length", [], 0, "manifest.training_length is 0, not a whole number from 1 to 16777216"),
    ("training_length", [], 33, "model.training_length is 32, but 33 by what else it says"),
    ("context_length", [], "8", "manifest.context_length is '8', not a whole number from 1 to 16777216"),
    ("model", ["max_position_embeddings"], 2**40, "manifest.model.max_position_embeddings is 1099511627776, not a"),
    ("model", ["hidden_size"], None, "manifest.model.hidden_size is None, not a whole number from 1 to 1048576"),
    ("model", ["eos_token_id"], -1, "manifest.model.eos_token_id is -1, not a whole number from 0 to 1048575"),
    ("linears", ["head"], 3, "manifest.linears['head'] is 3, not text"),
    ("position_code", ["limbs"], 10**9, "manifest.position_code.limbs is 1000000000, not a whole number from 1 to 24"),
    ("parity", ["mean_kl"], "small", "manifest.parity.mean_kl is 'small', not a number"),
    ("corpus", ["sources"], "text", "manifest.corpus.sources is 'text', not a list"),
    ("corpus", ["surprise"], 1, "manifest.corpus has the unknown entry 'surprise'"),
    ("self_test", ["tokens", 0], -1, "manifest.self_test.tokens[0] is -1, not a whole number from 0 to 1048575"),
    ("self_test", ["tokens", 0], 300, "self_test is no prompt and as many tokens of the vocabulary as logits"),
    ("self_test", ["logits"], [0.5], "self_test is no prompt and as many tokens of the vocabulary as logits"),
    ("self_test", ["prompt"], [], "self_test is no prompt and as many tokens of the vocabulary as logits"),
    ("parts", [0, "bytes"], -1, "manifest.parts[0].bytes is -1, not a whole number from 0 to"),
    ("operators", ["Add"], [], "manifest.operators['Add'] is [], not a whole number from 0 to"),
    ("requires_onnxruntime", [], "", "manifest.requires_onnxruntime is '', not a version"),
    ("created_by", [], ["me"], "manifest.created_by is ['me'], not text"),
    ("rounding", [], {"precision": "int8-static"}, "manifest.rounding has no block_size"),
    ("files", ["model.onnx"], None, "manifest.files['model.onnx'] is None, not text"),
    ("calibration", [], {"method": "minmax"}, "manifest.calibration has no windows"),
    ("calibration", [], "text", "manifest.calibration is 'text', not a mapping"),
]


@pytest.mark.parametrize(("entry", "path", "value", "message"), ENTRIES)
def test_entry_that_cannot_be(
    own_package: Path, entry: str, path: list[str | int], value: object, message: str
) -> None:
    changed = {entry: read_manifest(own_package)[entry]}
    place: Any = changed
    last: str | int = entry
    for key in path:
        place, last = place[last], key
    place[last] = value
    edit_manifest(own_package, **changed)

    assert refusal(own_package).startswith(message)


@pytest.mark.parametrize(
    "record",
    [
        {"ranges": {"head": [0.0]}},
        {"ranges": {"head": ["low", "high"]}},
        {"ranges": [1]},
        {"smoothing": {"head": None}},
        {"cache_scales": [{"key": [0, 1]}]},
        {"choice": {"kl": 0.1}},
    ],
    ids=str,
)
def test_calibration_that_cannot_be(own_package: Path, record: dict[str, Any]) -> None:
    always = {"method": "minmax", "windows": 1, "window_tokens": 32, "sources": [], "weights": ""}
    edit_manifest(own_package, calibration={**always, **record})

    assert refusal(own_package).startswith(f"manifest.calibration.{next(iter(record))}")


def without_end(path: Path) -> None:
    with (path / MANIFEST_FILE).open("r+b") as file:
        file.truncate(LARGEST_MANIFEST + 1)


def nested_deeply(path: Path) -> None:
    (path / MANIFEST_FILE).write_text("[" * 10**5 + "]" * 10**5, encoding="utf-8")


@pytest.mark.parametrize("damage", [without_end, nested_deeply])
def test_manifest_that_no_reader_should_take(own_package: Path, damage: Callable[[Path], None]) -> None:
    damage(own_package)

    with pytest.raises(PackageError) as caught:
        read_package(own_package)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("1.22", (1, 22)),
        ("1.23.1", (1, 23)),
        ("1.23rc1", (1, 23)),
        ("1.23.0+cpu", (1, 23)),
        ("2rc1", (2, 0)),
        ("1.9.dev20260101", (1, 9)),
        ("1.100", (1, 100)),
        ("git", (0, 0)),
    ],
)
def test_versions_are_read_by_their_first_two_numbers(version: str, expected: tuple[int, int]) -> None:
    assert release(version) == expected
