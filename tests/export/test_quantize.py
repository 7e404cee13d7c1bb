"""Packages made of a float32 package: the same as of the checkpoint, to the byte; and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from expe_edge.errors import ExportError, PackageError
from expe_edge.export.exporter import export
from expe_edge.export.source import open_source
from expe_edge.graph.build import build_graph
from expe_edge.graph.linears import Float32
from expe_edge.graph.nodes import operators_of
from expe_edge.graph.weights import read_weights
from expe_edge.package.directory import MODEL_FILE, read_package
from expe_edge.quant.recipe import Recipe
from expe_edge.training.run import train
from tests.command_line import names, refused, succeed, write_text
from tests.conftest import HAS_INT8_CACHE, PRECISIONS, needs_int8_cache
from tests.graphs import arrays_of, random_weights
from tests.manifests import edit_manifest, read_manifest
from tests.small import small_settings
from tests.strategies import small_config

pytestmark = pytest.mark.usefixtures("elsewhere")

#: Everything that a recipe may change beside the precision.
CACHE = "int8" if HAS_INT8_CACHE else "float32"
RICH = Recipe("int8-static", embedding="int4", cache=CACHE, smoothing=True, reduce_range=True)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, packages: Path) -> Path:
    """The packages of `packages`, made of its float32 one; and a rich one."""
    out = tmp_path_factory.mktemp("quantized")
    export(packages / "float32", out, [*PRECISIONS, RICH])
    return out


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """The rich package, made of the checkpoint."""
    out = tmp_path_factory.mktemp("rich")
    export(checkpoint, out, [RICH])
    return out


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory, plain_checkpoint: Path) -> Path:
    """A float32 package with its positions left in the products."""
    out = tmp_path_factory.mktemp("inline")
    (package,) = export(plain_checkpoint, out, ["float32"], positions="inline")
    return package.path


# The same packages.


def manifest_without_parity(package: Path) -> dict[str, Any]:
    return {**read_package(package).manifest.to_dict(), "parity": None}


@pytest.mark.parametrize("name", [*PRECISIONS, RICH.name])
def test_a_package_of_the_float32_package_is_that_of_the_checkpoint(
    quantized: Path, packages: Path, rich: Path, name: str
) -> None:
    of_package, of_checkpoint = quantized / name, (rich if name == RICH.name else packages) / name
    assert names(of_package) == names(of_checkpoint)
    assert (of_package / MODEL_FILE).read_bytes() == (of_checkpoint / MODEL_FILE).read_bytes()
    assert manifest_without_parity(of_package) == manifest_without_parity(of_checkpoint)


@pytest.mark.parametrize("name", PRECISIONS)
def test_parity_with_the_float32_graph_is_nearly_that_with_pytorch(quantized: Path, packages: Path, name: str) -> None:
    ours, theirs = (read_package(folder / name).manifest.parity for folder in (quantized, packages))
    assert ours["tokens"] == theirs["tokens"]
    assert abs(ours["mean_kl"] - theirs["mean_kl"]) < 1e-6
    if name == "float32":
        assert (ours["prefill_max"], ours["decode_max"]) == (0, 0)


def test_the_command_says_what_it_validated_against(packages: Path, tmp_path: Path) -> None:
    source = packages / "float32"
    result = succeed(
        *("quantize", source, "--out", "out", "--precision", "int8-dynamic", "--precision", "int8-static"),
        *("--json", "report.json"),
    )
    assert names("out") == ["int8-dynamic", "int8-static"]
    assert all(f"MB; against {source} over 512 tokens: " in line for line in result.stdout.splitlines())
    assert f"int8-dynamic: validating against {source}" in result.stderr
    described = json.loads((tmp_path / "report.json").read_text())["packages"]
    assert {package["validated_against"] for package in described} == {str(source)}


def test_a_checkpoint_may_be_quantized_too(checkpoint: Path, packages: Path) -> None:
    succeed("quantize", checkpoint, "--out", "out", "--precision", "int8-dynamic")
    assert Path("out/int8-dynamic", MODEL_FILE).read_bytes() == (packages / "int8-dynamic" / MODEL_FILE).read_bytes()


def test_inline_positions_stay_inline(inline: Path, plain_checkpoint: Path) -> None:
    options = ("--positions", "inline", "--precision", "int8-static")
    succeed("quantize", inline, "--out", "one", *options)
    succeed("export", plain_checkpoint, "--out", "other", *options)
    one, other = (Path(folder, "int8-static", MODEL_FILE).read_bytes() for folder in ("one", "other"))
    assert one == other


def test_packages_of_one_name_are_refused_before_any_is_written(packages: Path) -> None:
    recipes = [Recipe("int8-dynamic"), Recipe("int8-dynamic", embedding="float32")]
    with pytest.raises(ExportError, match=f"^2 packages would all be {Path('out', 'int8-dynamic')}; "):
        export(packages / "float32", Path("out"), recipes, force=True)
    assert not Path("out").exists()


def test_the_manifest_of_a_package_does_not_depend_on_what_is_made_beside_it(packages: Path) -> None:
    export(packages / "float32", Path("out"), ["int8-static", "int4-weight", "float32", "int8-dynamic"])
    for name in ("float32", "int8-dynamic"):
        found = read_package(Path("out", name)).manifest
        assert (found.calibration is None) is (name == "float32")
        assert {**found.to_dict(), "parity": None} == manifest_without_parity(packages / name)


# Reading weights back.

RECIPE = {
    "positional_parameters": {"softplus": True, "content_heads": 1, "temperature": 0.3},
    "output_gate": True,
}
MODELS: dict[str, tuple[dict[str, Any], bool]] = {
    "folded": ({}, True),
    "inline": ({}, False),
    "recipe": (RECIPE, True),
    "paper": ({"positional_parameters": {"where": "query_key"}}, True),
    "paper, inline": ({"positional_parameters": {"where": "query_key"}}, False),
    "positions in values": ({"positional_parameters": {"where": "query_key_value"}}, True),
    "positions in values, inline": ({"positional_parameters": {"where": "query_key_value"}}, False),
    "positions in the embedding": ({"positional_parameters": {"where": "embedding"}}, False),
    "exqpe": ({"positional": "exqpe"}, True),
    "relative": ({"positional": "relative"}, True),
    "rotary": ({"positional": "rotary"}, True),
    "tied gelu": ({"tie_word_embeddings": True, "hidden_act": "gelu"}, True),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_read_back_from_the_float32_graph(name: str) -> None:
    changes, folded = MODELS[name]
    weights = random_weights(small_config(**changes), folded=folded)
    found = read_weights(build_graph(weights, Float32()).model, weights.config, folded=folded)
    for old, new in zip(arrays_of(weights), arrays_of(found), strict=True):
        np.testing.assert_array_equal(old, new, strict=True)
    assert dataclasses.replace(found, embedding=weights.embedding).folded is folded
    assert build_graph(found, Float32()).model == build_graph(weights, Float32()).model


def test_a_graph_without_a_weight_is_refused_by_its_name() -> None:
    weights = random_weights()
    model = build_graph(weights, Float32()).model
    (index,) = (i for i, tensor in enumerate(model.graph.initializer) if tensor.name == "layers.1.attention.norm.gain")
    del model.graph.initializer[index]
    with pytest.raises(PackageError) as raised:
        read_weights(model, weights.config, folded=True)
    assert str(raised.value) == (
        "the graph has no weight 'layers.1.attention.norm.gain'; quantize the checkpoint, or export it again"
    )


# Sources that are refused.


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_a_package_of_rounded_weights_is_refused(packages: Path, precision: str) -> None:
    path = packages / precision
    assert refused("quantize", path, "--out", "out", "--precision", "int8-dynamic") == (
        f"{path} holds {precision} weights, which have lost what another format needs; quantize the checkpoint or a "
        "float32 package"
    )


@pytest.mark.parametrize(
    "recipe",
    [Recipe(embedding="int8"), pytest.param(Recipe(cache="int8"), marks=needs_int8_cache)],
    ids=["embedding", "cache"],
)
def test_a_float32_package_with_another_part_rounded_is_refused(packages: Path, tmp_path: Path, recipe: Recipe) -> None:
    (package,) = export(packages / "float32", tmp_path / "rounded", [recipe])
    with pytest.raises(ExportError, match=r"; quantize the checkpoint or a float32 package$"):
        open_source(package.path, folded=True)


def test_positions_are_where_the_package_has_them(packages: Path, inline: Path) -> None:
    folded = packages / "float32"
    assert refused("quantize", folded, "--out", "out", "--positions", "inline") == (
        f"{folded} has its positions folded; use --positions folded"
    )
    assert refused("quantize", inline, "--out", "out") == (f"{inline} has its positions inline; use --positions inline")


def test_a_damaged_package_is_refused(packages: Path, tmp_path: Path) -> None:
    package = Path(shutil.copytree(packages / "float32", tmp_path / "package"))
    (package / MODEL_FILE).write_bytes((package / MODEL_FILE).read_bytes()[:-1])
    assert refused("quantize", package, "--out", "out").startswith(f"{package}: model.onnx differs from its hash")
    assert refused("quantize", "nowhere", "--out", "out") == "nowhere: no such checkpoint directory"


# Ranges of another package.


def test_ranges_of_a_package_of_the_same_model_make_the_same_package(packages: Path) -> None:
    """Without observing again, so that how that would be done does not matter."""
    options = ("quantize", packages / "float32", "--precision", "int8-static", "--solver", "rtn")
    succeed(*options, "--out", "given")
    result = succeed(
        *(*options, "--out", "out", "--seed", "3", "--calibration-windows", "2"),
        *("--ranges-from", "given/int8-static"),
    )
    assert "observing" not in result.stderr
    assert Path("out/int8-static", MODEL_FILE).read_bytes() == Path("given/int8-static", MODEL_FILE).read_bytes()
    found, given = (read_package(Path(folder, "int8-static")).manifest.calibration for folder in ("out", "given"))
    assert found is not None
    assert given is not None
    assert (found["ranges"], found["weights"]) == (given["ranges"], given["weights"])


def test_other_windows_would_have_given_other_ranges(packages: Path) -> None:
    """So that the test above would fail without `--ranges-from`."""
    options = ("quantize", packages / "float32", "--precision", "int8-static", "--solver", "rtn")
    succeed(*options, "--out", "given")
    succeed(*options, "--out", "out", "--seed", "3", "--calibration-windows", "2")
    assert Path("out/int8-static", MODEL_FILE).read_bytes() != Path("given/int8-static", MODEL_FILE).read_bytes()


def test_ranges_of_another_model_are_refused(
    packages: Path, checkpoint: Path, plain_checkpoint: Path, tmp_path: Path
) -> None:
    """Of other weights in the same shapes, and of a model with its positions inline."""
    other = Path(shutil.copytree(checkpoint, tmp_path / "other", ignore=shutil.ignore_patterns("trainer")))
    weights = load_file(other / "model.safetensors")
    weights["blocks.0.feed_forward.up.weight"][0, 0] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    ranges = packages / "int8-static"
    for source, options in ((other, ()), (plain_checkpoint, ("--positions", "inline"))):
        assert refused(
            *("quantize", source, "--out", "out", "--precision", "int8-static", "--ranges-from", ranges), *options
        ) == (f"--ranges-from {ranges}: measured on another model, or on weights smoothed otherwise")


def test_ranges_of_a_package_that_has_none_are_refused(packages: Path) -> None:
    for name in ("float32", "int8-dynamic", "int4-weight"):
        path = packages / name
        assert refused(
            *("quantize", packages / "float32", "--out", "out", "--precision", "int8-static", "--ranges-from", path)
        ) == (f"--ranges-from {path}: it has no static ranges")


def test_ranges_that_do_not_cover_the_model_are_refused(packages: Path, tmp_path: Path) -> None:
    ranges = Path(shutil.copytree(packages / "int8-static", tmp_path / "ranges"))
    calibration = read_manifest(ranges)["calibration"]
    for changes in ({"head": [float("-inf"), 1.0]}, {"head": None}):
        kept = {name: bounds for name, bounds in {**calibration["ranges"], **changes}.items() if bounds is not None}
        edit_manifest(ranges, calibration={**calibration, "ranges": kept})
        assert refused(
            *("quantize", packages / "float32", "--out", "out", "--precision", "int8-static", "--ranges-from", ranges)
        ) == (f"--ranges-from {ranges}: no finite range of head; measure them anew")


def test_ranges_do_not_go_with_smoothing_which_changes_what_they_were_measured_on(packages: Path) -> None:
    message = refused(
        *("quantize", packages / "float32", "--out", "out", "--precision", "int8-static", "--smoothing"),
        *("--ranges-from", packages / "int8-static"),
    )
    assert "--ranges-from" in message
    assert "--smoothing" in message


# Options that are refused, each in one line and with nothing written.

REFUSALS: list[tuple[list[str], str]] = [
    (["--block-size", "48"], "--block-size is 48; onnxruntime takes 16, 32, 64, 128, 256"),
    (["--solver", "gtpq"], "unknown solver 'gtpq'; did you mean 'gptq'? available: gptq, rtn; change --solver"),
    (["--reduce-range"], "--reduce-range has no meaning for float32; it is for int8-dynamic and int8-static"),
    (["--budget-kl", "0.1"], "--budget-kl is for --precision auto, not float32"),
    (["--max-size", "1MB"], "--max-size is for --precision auto, not float32"),
    (["--precision", "auto"], "--precision auto needs --budget-kl or --max-size, one of them"),
    (
        ["--precision", "auto", "--max-size", "1MB", "--budget-kl", "0.1"],
        "--precision auto needs --budget-kl or --max-size, one of them",
    ),
    (["--calibration-data", "gone.txt"], "--calibration-data gone.txt: no such file or folder"),
    (["--precision", "auto", "--max-size", "big"], "--max-size big: expected bytes, as 600kB or 1.5MB"),
    (
        ["--precision", "int4-weight", "--calibration-windows", "2"],
        "2 windows of 32 tokens are too few for --solver gptq, which needs 176, one for each input of the widest "
        "linear; raise --calibration-windows to 6, or use --solver rtn",
    ),
    (
        ["--precision", "int8-static", "--calibration-method", "entropy", "--calibration-windows", "3"],
        "3 windows of 32 tokens are too few for --calibration-method entropy, which needs 128 tokens; raise "
        "--calibration-windows to 4, or use minmax",
    ),
]


@pytest.mark.parametrize("command", ["quantize", "export"])
@pytest.mark.parametrize(("options", "message"), REFUSALS, ids=lambda value: " ".join(value) if value else "")
def test_options_that_cannot_be_are_refused(
    packages: Path, checkpoint: Path, options: list[str], message: str, command: str
) -> None:
    source = packages / "float32" if command == "quantize" else checkpoint
    assert refused(command, source, "--out", "out", *options) == message


@pytest.mark.parametrize("options", [case[0] for case in REFUSALS[-2:]], ids=lambda value: value[1])
def test_too_few_windows_are_refused_before_other_packages_are_written(packages: Path, options: list[str]) -> None:
    refused("quantize", packages / "float32", "--out", "out", "--precision", "float32", *options)


def test_rounding_to_the_nearest_needs_no_calibration_text(packages: Path) -> None:
    """Nor does it refuse text that is too short to calibrate on; the validation repeats it."""
    text = write_text("short.txt", "the bright river runs under the old stone and the tree grows over.")
    options = ("--precision", "int8-weight", "--solver", "rtn", "--calibration-data", text)
    result = succeed("quantize", packages / "float32", "--out", "out", *options)
    assert "observing" not in result.stderr
    assert read_package(Path("out/int8-weight")).manifest.calibration is None


@needs_int8_cache
def test_a_cache_of_values_that_carry_positions_has_no_int8_range(text_folder: Path, tmp_path: Path) -> None:
    """Their size grows with the text."""
    settings = small_settings(text_folder, max_steps=1, positional_parameters={"where": "query_key_value"})
    train(settings, tmp_path / "model")
    assert refused("export", "model", "--out", "out", "--cache", "int8") == (
        "the values of this model carry positions (where: query_key_value), which no fixed int8 range holds at every "
        "length; use --cache float32"
    )


def test_an_embedding_that_is_the_head_has_no_format_of_its_own(text_folder: Path, tmp_path: Path) -> None:
    train(small_settings(text_folder, max_steps=1, tie_word_embeddings=True), tmp_path / "model")
    assert refused("export", "model", "--out", "out", "--embedding", "int8") == (
        "this model's head is its embedding, stored once in the head's format; drop --embedding"
    )
    (package,) = export(tmp_path / "model", tmp_path / "out", ["int4-weight"])
    manifest = read_package(package.path).manifest
    assert manifest.embedding == "int4-weight"
    stored = [tensor.name for tensor in onnx.load(package.path / MODEL_FILE).graph.initializer]
    assert "embedding.weight" in stored
    assert "head.weight" not in stored


# What a manifest says of the parts.


@pytest.mark.parametrize("name", [*PRECISIONS, RICH.name])
def test_the_parts_add_up_to_the_file_and_name_every_weight(quantized: Path, name: str) -> None:
    package = read_package(quantized / name)
    parts, model = package.manifest.parts, onnx.load(package.model_path)
    assert sum(part["bytes"] for part in parts) == package.model_path.stat().st_size
    assert len({part["part"] for part in parts}) == len(parts)
    found = {part["part"]: part["format"] for part in parts}
    assert {**package.manifest.linears, "embedding": package.manifest.embedding}.items() <= found.items()
    sizes = {part["part"]: part["bytes"] for part in parts}
    for linear in package.manifest.linears:
        stored = [tensor for tensor in model.graph.initializer if tensor.name.startswith(f"{linear}.")]
        assert sizes[linear] == sum(numpy_helper.to_array(tensor).nbytes for tensor in stored)
    assert {"positions", "norms", "graph"} <= found.keys()
    assert ("cache scales" in found) is (name == RICH.name and HAS_INT8_CACHE)


@pytest.mark.parametrize("name", [*PRECISIONS, RICH.name])
def test_the_manifest_counts_the_operators_of_the_graph(quantized: Path, name: str) -> None:
    package = read_package(quantized / name)
    assert package.manifest.operators == operators_of(onnx.load(package.model_path))
    assert package.manifest.operators["Sigmoid"] == 2 * package.manifest.contract.layers  # within functions
    linears, kernels = package.manifest.linears, package.manifest.kernels
    for kernel in ("MatMulNBits", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
        promised = {"MatMulNBits": "-weight", "MatMulIntegerToFloat": "-static", "DynamicQuantizeMatMul": "-dynamic"}
        assert kernels.get(kernel, 0) == sum(kind.endswith(promised[kernel]) for kind in linears.values())
