"""Opening a package that lies: what onnxruntime finds in the graph is held to what the manifest says."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from expe_edge.errors import GenerationError, PackageError
from expe_edge.export.exporter import export
from expe_edge.package.directory import file_hash
from expe_edge.quality.scoring import open_scorer
from expe_edge.quant.recipe import Recipe
from expe_edge.runtime import Generator, PackageSession
from expe_edge.runtime.cache import make_storage
from expe_edge.runtime.growing import GrowingStorage
from expe_edge.runtime.shared import SharedStorage
from expe_edge.runtime.storage import Storage
from tests.conftest import needs_int8_cache
from tests.manifests import edit_manifest, read_manifest


def replace_graph(package: Path, model: onnx.ModelProto) -> None:
    """Put another graph into a package, with the hash that belongs to it."""
    onnx.save(model, package / "model.onnx")
    edit_manifest(package, files={**read_manifest(package)["files"], "model.onnx": file_hash(package / "model.onnx")})


def describe(package: Path, contract: dict[str, object], **sizes: object) -> None:
    """Let the manifest speak of a model of other sizes, consistently."""
    values = read_manifest(package)
    edit_manifest(package, contract={**values["contract"], **contract}, model={**values["model"], **sizes})


def refusal(package: Path) -> str:
    """Return how the graph differs, as every way of opening the package says."""
    before = f"{package}/model.onnx is not the graph that its manifest describes: "
    messages = set()
    for opener in (PackageSession.load, Generator.load, open_scorer):
        with pytest.raises(PackageError) as caught:
            opener(package)
        messages.add(str(caught.value))
    (message,) = messages
    assert message.startswith(before)
    return message.removeprefix(before)


def test_manifest_of_more_layers(own_package: Path) -> None:
    describe(own_package, {"layers": 1024}, num_hidden_layers=1024)

    assert refusal(own_package) == "it has 7 inputs, not 2051"


def test_manifest_of_larger_heads(own_package: Path) -> None:
    describe(own_package, {"head_size": 4096}, hidden_size=4 * 4096)

    assert refusal(own_package) == (
        "input 'past_key_values.0.key' has axes ['batch_size', 2, 'past', 16], not ['batch_size', 2, 'past', 4096]"
    )


def test_manifest_of_another_cache(own_package: Path) -> None:
    describe(own_package, {"cache_dtype": "int8"})

    assert refusal(own_package) == "input 'past_key_values.0.key' is tensor(float), not tensor(int8)"


def test_manifest_of_a_larger_vocabulary(own_package: Path) -> None:
    describe(own_package, {"vocab_size": 2**20}, vocab_size=2**20)

    assert refusal(own_package) == (
        "output 'logits' has axes ['batch_size', 'sequence', 300], not ['batch_size', 'sequence', 1048576]"
    )


def test_manifest_of_fewer_layers(own_package: Path) -> None:
    describe(own_package, {"layers": 1}, num_hidden_layers=1)

    assert refusal(own_package) == "it has 7 inputs, not 5"


def test_graph_of_other_names(own_package: Path) -> None:
    model = onnx.load(own_package / "model.onnx")
    for value in (*model.graph.input, *(node for node in model.graph.node)):
        if getattr(value, "name", "") == "position_ids":
            value.name = "positions"
    for node in model.graph.node:
        node.input[:] = ["positions" if name == "position_ids" else name for name in node.input]
    replace_graph(own_package, model)

    assert refusal(own_package) == "input 'positions' stands where 'position_ids' should"


def test_a_source_of_other_packages_is_held_to_its_manifest_too(own_package: Path, tmp_path: Path) -> None:
    describe(own_package, {}, intermediate_size=8)

    with pytest.raises(PackageError, match=r"^the graph's up is float32 \(64, \d+\), but float32 \(64, 16\) by its"):
        export(own_package, tmp_path / "out", ["float16"])

    assert not (tmp_path / "out").exists()


def external_graph(location: str) -> onnx.ModelProto:
    """A graph whose one weight stands in another file."""
    weight = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, [4])
    node = helper.make_node("Identity", ["weight"], ["out"])
    graph = helper.make_graph([node], "lies", [], [output], initializer=[weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("location", ["../secret", "{folder}/secret", "sub/../../secret"])
def test_weights_outside_the_package_are_not_read(own_package: Path, location: str, link: bool) -> None:
    """Not every onnxruntime and onnx of those that we run with refuse, so we do."""
    (own_package.parent / "secret").write_bytes(bytes(16))
    (own_package / "sub").mkdir()
    if link:
        (own_package / "sub" / "link").symlink_to(own_package.parent / "secret")
        location = "sub/link"
    model = external_graph(location.format(folder=own_package.parent))
    (own_package / "model.onnx").write_bytes(model.SerializeToString())
    edit_manifest(
        own_package,
        files={**read_manifest(own_package)["files"], "model.onnx": file_hash(own_package / "model.onnx")},
    )

    message = r"model\.onnx keeps weights in other files, as no package does; export it again$"
    with pytest.raises(PackageError, match=message):
        PackageSession.load(own_package)
    with pytest.raises(PackageError, match=message):
        export(own_package, own_package.parent / "out", ["float16"])


@pytest.mark.parametrize(
    "recipe",
    [
        "float32",
        "int8-static",
        pytest.param(Recipe("float32", cache="int8"), marks=needs_int8_cache),
        Recipe(portable=True),
    ],
)
def test_rows_of_several_lengths_are_those_rows_alone(checkpoint: Path, tmp_path: Path, recipe: Recipe | str) -> None:
    (exported,) = export(checkpoint, tmp_path / "out", [recipe])
    session = PackageSession.load(exported.path)
    rows = [np.random.default_rng(length).integers(0, 300, length) for length in (40, 7, 1, 23)]

    together = session.forward(rows)

    for row, logits in zip(rows, together, strict=True):
        (alone,) = session.prefill(session.new_cache(1, len(row)), row)
        np.testing.assert_allclose(logits, alone, rtol=0, atol=1e-4)


def test_rows_longer_than_the_encoding_are_refused(packages: Path) -> None:
    session = PackageSession.load(packages / "float32")

    with pytest.raises(GenerationError, match=r"exceed the \d+ positions of this model's encoding"):
        session.forward([np.broadcast_to(np.int64(0), session.reach + 1)])


def test_graph_that_fails_at_work_is_one_line(packages: Path, tmp_path: Path) -> None:
    """The kind of cache is the one thing that inputs and outputs do not tell."""
    (portable,) = export(packages / "float32", tmp_path, [Recipe(portable=True)])
    describe(portable.path, {"growing_cache": False})

    with pytest.raises(PackageError, match=r"model\.onnx: onnxruntime cannot run it \([^\n]+\)$"):
        Generator.load(portable.path).generate(["the"], max_new_tokens=4)


@pytest.mark.parametrize("kind", [SharedStorage, GrowingStorage])
def test_cache_that_memory_has_no_room_for(
    own_package: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Storage]
) -> None:
    contract = dataclasses.replace(PackageSession.load(own_package).contract, growing_cache=kind is GrowingStorage)
    storage = make_storage(contract, 2, 1000)
    full = [np.zeros((contract.key_value_heads, 900, contract.head_size), np.float32) for _ in contract.past_names]
    monkeypatch.setattr(np, "zeros", no_room)
    monkeypatch.setattr(np, "empty", no_room)

    def fill() -> None:
        storage.reserve(900)
        storage.write(0, full, 900)

    with pytest.raises(GenerationError) as caught:
        fill()

    rows = 1 if kind is GrowingStorage else 2
    assert str(caught.value) == (
        f"no memory for a cache of {rows} × 1000 tokens, {rows * 512_000:,} bytes; lower `max_new_tokens` or "
        "`cache_length`"
    )


def no_room(*_: object, **__: object) -> None:
    raise MemoryError


def test_more_threads_than_cores_are_said(own_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cores = os.cpu_count() or 1
    PackageSession.load(own_package, threads=cores)
    assert capsys.readouterr().err == ""
    PackageSession.load(own_package, threads=cores + 1)
    said = f"`threads` is {cores + 1}, but this machine has {cores} cores: they will wait for one another\n"
    assert capsys.readouterr().err == said
