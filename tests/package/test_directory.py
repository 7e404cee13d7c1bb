"""The package on disk: complete or absent, verified when opened, and the contract of its graph."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime as ort
import pytest

from expe_edge.errors import PackageError
from expe_edge.package.contract import ORT_TYPES, GraphContract, TensorSpec
from expe_edge.package.directory import (
    CARD_FILE,
    MODEL_FILE,
    Package,
    file_hash,
    is_package,
    read_package,
    seal_package,
)
from expe_edge.package.manifest import FORMAT_VERSION, MANIFEST_FILE, Manifest
from expe_edge.runtime import PackageSession
from tests.conftest import PRECISIONS
from tests.manifests import edit_manifest, read_manifest

DAMAGED = "export the package again"
#: Precisions that rest on calibration text: for ranges, or for gptq's view of the inputs.
MEASURED = ("int8-dynamic", "int8-static", "int8-weight", "int4-weight")


@pytest.fixture
def package(packages: Path, tmp_path: Path) -> Path:
    """A copy of a package, to be damaged."""
    return Path(shutil.copytree(packages / "float32", tmp_path / "package"))


def refusal(path: Path, opener: Callable[[Path], Any] = read_package) -> str:
    """Return the message of the `PackageError` that opening `path` raises."""
    with pytest.raises(PackageError) as caught:
        opener(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Reading


@pytest.mark.parametrize("precision", PRECISIONS)
def test_package_is_complete_and_verified(packages: Path, precision: str) -> None:
    package = read_package(packages / precision)

    assert is_package(package.path)
    assert package.manifest.precision == precision
    written = {file.name for file in package.path.iterdir()}
    assert set(package.manifest.files) == written - {MANIFEST_FILE, CARD_FILE}
    assert CARD_FILE in written
    assert {"model.onnx", "config.json", "generation_config.json", "genai_config.json", "tokenizer.json"} <= set(
        package.manifest.files
    )
    assert all(len(digest) == 64 for digest in package.manifest.files.values())
    assert (package.model_path.name, package.tokenizer_path.name) == ("model.onnx", "tokenizer.json")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_manifest_survives_json(packages: Path, precision: str) -> None:
    path = packages / precision / MANIFEST_FILE
    manifest = read_package(packages / precision).manifest

    assert Manifest.from_json(manifest.to_json(), path) == manifest
    assert manifest.to_json() == path.read_text(encoding="utf-8")
    assert manifest.format_version == FORMAT_VERSION == 2
    assert (manifest.calibration is not None) is (precision in MEASURED)


def test_missing_package(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"{tmp_path}/none: no such package directory"


def test_file_in_place_of_a_package(package: Path) -> None:
    model = package / MODEL_FILE

    assert refusal(model) == f"{model}: no such package directory"


def test_directory_that_is_no_package(tmp_path: Path, checkpoint: Path) -> None:
    for path in (tmp_path, checkpoint):
        assert not is_package(path)
        assert refusal(path) == f"{path}: no expe_edge.json in it, so not a package; make one with export"


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "config.json", "genai_config.json"])
def test_missing_file(package: Path, name: str) -> None:
    (package / name).unlink()

    assert refusal(package) == f"{package}: {name} is missing; the package is incomplete, export it again"


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "config.json", "genai_config.json"])
@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: data[: len(data) // 2], lambda _: b"", lambda data: data + b"\0"],
    ids=["last byte", "half", "empty", "longer"],
)
def test_truncated_or_longer_file(package: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    (package / name).write_bytes(damage((package / name).read_bytes()))

    assert refusal(package) == f"{package}: {name} differs from its hash in expe_edge.json; {DAMAGED}"


@pytest.mark.parametrize("place", [0, 100_000, -1])
def test_one_changed_bit(package: Path, place: int) -> None:
    data = bytearray((package / MODEL_FILE).read_bytes())
    data[place] ^= 1
    (package / MODEL_FILE).write_bytes(data)

    assert refusal(package) == f"{package}: model.onnx differs from its hash in expe_edge.json; {DAMAGED}"


def test_model_that_no_runtime_can_open(package: Path) -> None:
    """A hash tells what was written, not that it was good: onnxruntime has the last word, in one line."""
    manifest = read_package(package).manifest
    (package / MODEL_FILE).write_bytes((package / MODEL_FILE).read_bytes()[:1000])
    (package / MANIFEST_FILE).unlink()
    seal_package(package, manifest)

    message = refusal(package, PackageSession.load)

    assert message.startswith(f"{package}/model.onnx: onnxruntime {ort.__version__} cannot open it (")


@pytest.mark.parametrize("version", [3, 99, 2.5, "2"])
def test_newer_format(package: Path, version: object) -> None:
    edit_manifest(package, format_version=version, something_new={"that": "old releases do not know"})

    assert refusal(package) == (
        f"{package}/expe_edge.json: format version {version}, newer than 2, the newest this release reads; "
        "upgrade expe-edge"
    )


def test_older_format(package: Path) -> None:
    edit_manifest(package, format_version=1)

    assert refusal(package) == f"{package}/expe_edge.json: format version 1, not 2; {DAMAGED}"


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '"text"', "{}", '{"files": {}}'])
def test_manifest_that_is_none(package: Path, text: str) -> None:
    (package / MANIFEST_FILE).write_text(text, encoding="utf-8")

    assert refusal(package) == f"{package}/expe_edge.json: not a manifest of expe-edge; {DAMAGED}"


def test_manifest_that_is_cut_short(package: Path) -> None:
    text = (package / MANIFEST_FILE).read_text(encoding="utf-8")
    for kept in range(0, len(text) - 2, 97):
        (package / MANIFEST_FILE).write_text(text[:kept], encoding="utf-8")

        assert refusal(package) == f"{package}/expe_edge.json: not a manifest of expe-edge; {DAMAGED}"


def test_manifest_that_is_not_text(package: Path) -> None:
    (package / MANIFEST_FILE).write_bytes(b"\xff\xfe\x00")

    assert refusal(package).startswith(f"{package}: no expe_edge.json in it, so not a package")


#: Entries that every manifest has.
REQUIRED = [field.name for field in dataclasses.fields(Manifest) if field.default is dataclasses.MISSING]


@pytest.mark.parametrize("name", REQUIRED)
def test_manifest_without_an_entry(package: Path, name: str) -> None:
    edit_manifest(package, without=name)

    assert refusal(package).startswith(f"{package}/expe_edge.json: damaged manifest (")
    assert refusal(package).endswith(f"); {DAMAGED}")


@pytest.mark.parametrize(
    "changes",
    [
        {"surprise": 1},
        {"contract": 3},
        {"contract": {"layers": 2}},
        {"contract": {"layers": 2, "key_value_heads": 2, "head_size": 16, "vocab_size": 300, "surprise": 1}},
        {"files": 5},
        {"files": ["model.onnx", "tokenizer.json"]},
        {"files": {}},
        {"model": [1]},
        {"model": "expe"},
        {"corpus": "text"},
        {"recipe": ["gptq"]},
        {"kernels": 3},
    ],
    ids=str,
)
def test_manifest_with_entries_of_another_kind(package: Path, changes: dict[str, Any]) -> None:
    edit_manifest(package, **changes)

    assert refusal(package).startswith(f"{package}/expe_edge.json: damaged manifest (")
    assert refusal(package).endswith(f"); {DAMAGED}")


def change_a_range(manifest: dict[str, Any]) -> None:
    manifest["calibration"]["ranges"]["head"][1] *= 2


def drop_the_digest(manifest: dict[str, Any]) -> None:
    del manifest["digest"]


def change_a_length(manifest: dict[str, Any]) -> None:
    manifest["training_length"] += 1


def add_an_entry(manifest: dict[str, Any]) -> None:
    manifest["note"] = "by hand"


@pytest.mark.parametrize("change", [change_a_range, drop_the_digest, change_a_length, add_an_entry])
def test_manifest_edited_by_hand(packages: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The files may all be whole: ranges and sizes that clients and `--ranges-from` rely on stand here alone."""
    package = Path(shutil.copytree(packages / "int8-static", tmp_path / "package"))
    manifest = read_manifest(package)
    change(manifest)
    (package / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")

    assert refusal(package) == f"{package}/expe_edge.json: changed since it was written (its digest differs); {DAMAGED}"


def test_manifest_laid_out_otherwise_is_no_damage(package: Path) -> None:
    values = read_manifest(package)
    (package / MANIFEST_FILE).write_text(json.dumps(dict(sorted(values.items())), indent=7), encoding="utf-8")

    assert isinstance(read_package(package), Package)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", ".", "sub/../../secret", "sub/inside", ""])
def test_manifest_that_names_files_elsewhere(package: Path, name: str) -> None:
    """Even with the right hash, a file outside the package is never read as one of its own."""
    (package.parent / "secret").write_text("secret", encoding="utf-8")
    (package / "sub").mkdir()
    (package / "sub" / "inside").write_text("secret", encoding="utf-8")
    edit_manifest(package, files={**read_manifest(package)["files"], name: file_hash(package.parent / "secret")})

    assert refusal(package) == f"{package}: {name} is missing; the package is incomplete, export it again"


def test_file_beside_those_of_the_manifest_is_no_damage(package: Path) -> None:
    (package / "README.md").write_text("ours", encoding="utf-8")

    assert isinstance(read_package(package), Package)


# The contract


def test_contract_has_the_agreed_names_dtypes_and_axes() -> None:
    contract = GraphContract(layers=2, key_value_heads=3, head_size=8, vocab_size=300)
    kinds = {spec.name: (spec.dtype, spec.shape) for spec in (*contract.inputs, *contract.outputs)}

    assert kinds == {
        "input_ids": ("int64", ("batch_size", "sequence")),
        "attention_mask": ("int64", ("batch_size", "total_sequence")),
        "position_ids": ("int64", ("batch_size", "sequence")),
        "past_key_values.0.key": ("float32", ("batch_size", 3, "past", 8)),
        "past_key_values.0.value": ("float32", ("batch_size", 3, "past", 8)),
        "past_key_values.1.key": ("float32", ("batch_size", 3, "past", 8)),
        "past_key_values.1.value": ("float32", ("batch_size", 3, "past", 8)),
        "logits": ("float32", ("batch_size", "sequence", 300)),
        "present.0.key": ("float32", ("batch_size", 3, "total_sequence", 8)),
        "present.0.value": ("float32", ("batch_size", 3, "total_sequence", 8)),
        "present.1.key": ("float32", ("batch_size", 3, "total_sequence", 8)),
        "present.1.value": ("float32", ("batch_size", 3, "total_sequence", 8)),
    }
    assert contract.past_names == tuple(spec.name for spec in contract.inputs[3:])
    assert contract.present_names == tuple(spec.name for spec in contract.outputs[1:])


def test_packages_of_earlier_releases_have_another_name_for_the_rows() -> None:
    contract = GraphContract(layers=1, key_value_heads=1, head_size=4, vocab_size=8)

    def nodes(specs: Sequence[TensorSpec], batch: str) -> list[SimpleNamespace]:
        shapes = (tuple(batch if axis == "batch_size" else axis for axis in spec.shape) for spec in specs)
        return [
            SimpleNamespace(name=spec.name, type=ORT_TYPES[spec.dtype], shape=shape)
            for spec, shape in zip(specs, shapes, strict=True)
        ]

    for batch, same in (("batch_size", True), ("batch", True), ("rows", False)):
        difference = contract.difference(nodes(contract.inputs, batch), nodes(contract.outputs, batch))
        assert (difference is None) is same


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_cache_dtype_is_the_caches_alone(dtype: str) -> None:
    contract = GraphContract(layers=1, key_value_heads=1, head_size=4, vocab_size=8, cache_dtype=dtype)

    for spec in (*contract.inputs, *contract.outputs):
        cached = spec.name.startswith(("past_key_values.", "present."))
        assert spec.dtype == (dtype if cached else "float32" if spec.name == "logits" else "int64")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_graph_keeps_the_contract_of_its_manifest(packages: Path, precision: str) -> None:
    package = read_package(packages / precision)
    session = ort.InferenceSession(str(package.model_path), providers=["CPUExecutionProvider"])
    types = {"int64": "tensor(int64)", "float32": "tensor(float)"}
    contract = package.manifest.contract

    for found, agreed in ((session.get_inputs(), contract.inputs), (session.get_outputs(), contract.outputs)):
        assert [(node.name, node.type, tuple(node.shape)) for node in found] == [
            (spec.name, types[spec.dtype], spec.shape) for spec in agreed
        ]
