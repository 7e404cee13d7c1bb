"""Fine-tuning for a format: what a run learns, the checkpoint it leaves, and what export makes of that."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

from expe_edge.calibration.observations import Calibration
from expe_edge.errors import CheckpointError, ConfigError
from expe_edge.export.exporter import export, open_exporter
from expe_edge.export.source import open_source
from expe_edge.graph.build import HEAD
from expe_edge.graph.run import graph_feeds
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.package.directory import read_package
from expe_edge.quant import blocks
from expe_edge.quant.recipe import PER_CHANNEL, WEIGHT_BITS, Recipe, WeightRounding
from expe_edge.quant.solvers import refined_gptq
from expe_edge.text.tokenization import encode_documents
from expe_edge.training.checkpoint import load_checkpoint, starting_settings
from expe_edge.training.rounding import distillation_loss
from expe_edge.training.run import train
from expe_edge.training.settings import TrainSettings, make_settings
from tests.command_line import refused, succeed, tree
from tests.graphs import watched
from tests.rounding import ROUNDINGS, rounded, seen
from tests.small import small_settings

pytestmark = pytest.mark.usefixtures("elsewhere")


def settings_from(checkpoint: Path, **flags: Any) -> TrainSettings:
    """Settings of a run that starts from a checkpoint, as the command line makes them."""
    return make_settings(flags=flags, stored=starting_settings(checkpoint))


def divergence(model: ExPEForCausalLM, teacher: ExPEForCausalLM, tokens: np.ndarray) -> float:
    """KL(teacher ‖ model), nats per token, on token ids (B, T)."""
    with torch.no_grad():
        logits, wanted = (each(input_ids=torch.from_numpy(tokens), use_cache=False).logits for each in (model, teacher))
        return float(distillation_loss(logits, wanted))


@pytest.fixture(scope="session")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """The checkpoint fine-tuned for 4 bits with one scale for a whole row."""
    out = tmp_path_factory.mktemp("fine-tuned") / "model"
    train(settings_from(checkpoint, quantization_aware="int4-weight", block_size=256, max_steps=40), out)
    return out


# Fine-tuning.


def test_fine_tuning_brings_the_rounded_model_closer_to_the_float_one(checkpoint: Path, fine_tuned: Path) -> None:
    """On text that neither has seen, at 16 training lengths."""
    teacher, student = load_checkpoint(checkpoint), load_checkpoint(fine_tuned)
    documents = encode_documents(teacher.tokenizer, teacher.corpus().held_out)
    tokens = np.stack([document[:512] for document in documents]).astype(np.int64)
    rounding = student.rounding
    assert rounding == WeightRounding("int4-weight", 256)

    before = divergence(rounded(teacher.model, rounding), teacher.model, tokens)
    after = divergence(rounded(student.model, rounding), teacher.model, tokens)

    assert after < 0.7 * before


def test_the_checkpoint_it_starts_from_stays_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    before, weights = tree(checkpoint), load_file(checkpoint / "model.safetensors")

    train(settings_from(checkpoint, quantization_aware="int8-dynamic", max_steps=2), tmp_path / "out")

    assert tree(checkpoint) == before
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == weights.keys()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (checkpoint / "tokenizer.json").read_text()
    assert not torch.equal(ours["head.weight"], weights["head.weight"])


def test_the_record_says_what_the_weights_are_for(checkpoint: Path, tmp_path: Path) -> None:
    """With the block size that was the precision's own then, whatever it is when the record is read."""
    train(settings_from(checkpoint, quantization_aware="int4-weight", max_steps=1), tmp_path / "out")

    recorded = json.loads((tmp_path / "out" / "training.json").read_text())["settings"]
    assert (recorded["quantization_aware"], recorded["block_size"]) == ("int4-weight", blocks.BLOCK_SIZE[4])
    assert recorded["from_checkpoint"] == str(checkpoint)
    assert load_checkpoint(tmp_path / "out").rounding == WeightRounding("int4-weight", blocks.BLOCK_SIZE[4])
    assert load_checkpoint(checkpoint).rounding is None


@pytest.mark.parametrize("distillation", [True, False])
def test_a_resumed_run_equals_an_uninterrupted_one(checkpoint: Path, tmp_path: Path, distillation: bool) -> None:
    flags = {"quantization_aware": "int4-weight", "max_steps": 8, "save_every": 4, "distillation": distillation}
    settings = settings_from(checkpoint, **flags)
    train(settings, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "trainer" / "checkpoint-8")  # as if stopped after the first checkpoint
    (tmp_path / "resumed" / "model.safetensors").unlink()

    train(settings, tmp_path / "resumed", resume=True)

    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("resumed", "whole"))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=0, msg=name)


def test_without_rounding_it_is_training_that_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    before = json.loads((checkpoint / "training.json").read_text())["history"][-1]["loss"]

    report = train(settings_from(checkpoint, max_steps=5), tmp_path / "out")

    assert report["history"][0]["loss"] == pytest.approx(before, abs=0.3)  # not the loss of fresh weights
    assert load_checkpoint(tmp_path / "out").rounding is None


def test_a_second_fine_tuning_is_for_what_it_says_itself(fine_tuned: Path) -> None:
    settings = settings_from(fine_tuned)

    assert (settings.rounding, settings.from_checkpoint) == (None, str(fine_tuned))


def test_weights_of_8_bits_take_smaller_steps(checkpoint: Path) -> None:
    rates = [starting_settings(checkpoint, rounding)["learning_rate"] for rounding in (None, *ROUNDINGS)]

    assert rates == [1e-4, 1e-4, 1e-4, 1e-5, 1e-5, 1e-5]


@pytest.mark.parametrize("positional", ["exqpe", "rotary"])
def test_other_encodings_are_fine_tuned_too(tmp_path: Path, text_folder: Path, positional: str) -> None:
    train(small_settings(text_folder, positional=positional, max_steps=2, hidden_size=32), tmp_path / "start")
    report = train(
        settings_from(tmp_path / "start", quantization_aware="int4-weight", max_steps=2), tmp_path / "fine-tuned"
    )

    assert report["settings"]["positional"] == positional
    export(tmp_path / "fine-tuned", tmp_path / "packages", ["int4-weight"])


# Exporting.


@pytest.mark.parametrize("recipe", [Recipe("int4-weight", portable=True), Recipe("int8-static", solver="rtn")], ids=str)
def test_onnxruntime_restores_the_weights_that_training_saw(recipe: Recipe, fine_tuned: Path, tmp_path: Path) -> None:
    """From the file that an export writes, by its own DequantizeLinear nodes."""
    (package,) = export(fine_tuned, tmp_path, [recipe])
    rounding = (
        WeightRounding("int4-weight", 256) if recipe.precision == "int4-weight" else WeightRounding("int8-static")
    )
    model = onnx.load(read_package(package.path).model_path)
    outputs = {node.name: node.output[0] for node in model.graph.node}

    with torch.no_grad():
        weights = seen(rounded(load_checkpoint(fine_tuned).model, rounding))
    expected = {HEAD: weights.head}
    for index, layer in enumerate(weights.layers):
        parts = {"attention.qkv": layer.qkv, "attention.out": layer.out}
        parts |= {"feed_forward.up": layer.up, "feed_forward.down": layer.down}
        expected |= {f"layers.{index}.{part}": matrix for part, matrix in parts.items()}
    names = [outputs[f"{linear}.matrix"] for linear in expected]
    contract = read_package(package.path).manifest.contract
    found = watched(model, names).run(names, graph_feeds(contract, np.zeros((1, 2), dtype=np.int64)))
    for linear, matrix in zip(expected, found, strict=True):
        np.testing.assert_array_equal(matrix, expected[linear], err_msg=linear)


def test_an_export_rounds_as_training_did(fine_tuned: Path, tmp_path: Path) -> None:
    export(fine_tuned, tmp_path, ["int4-weight", "int8-weight"])

    four, eight = (read_package(tmp_path / name).manifest.recipe for name in ("int4-weight", "int8-weight"))
    assert (four["solver"], four["block_size"]) == ("rtn", 256)
    assert (eight["solver"], eight["block_size"]) == (None, None)


def test_a_float32_package_remembers_what_its_weights_are_for(fine_tuned: Path, tmp_path: Path) -> None:
    export(fine_tuned, tmp_path, ["float32"])

    assert open_source(tmp_path / "float32", folded=True).rounding == WeightRounding("int4-weight", 256)


def test_positions_left_inside_are_not_what_was_trained(fine_tuned: Path) -> None:
    assert open_source(fine_tuned, folded=True).rounding == WeightRounding("int4-weight", 256)
    assert open_source(fine_tuned, folded=False).rounding is None


@pytest.mark.parametrize(
    ("recipe", "resolved"),
    [
        (Recipe("int4-weight"), Recipe("int4-weight", solver="rtn", block_size=32)),
        (Recipe("int4-weight", block_size=32), Recipe("int4-weight", solver="rtn", block_size=32)),
        (Recipe("int4-weight", solver="gptq"), Recipe("int4-weight", solver="gptq", block_size=32)),
        (Recipe("int4-weight", block_size=64), Recipe("int4-weight", block_size=64)),
        (Recipe("int4-weight", smoothing=True), Recipe("int4-weight", smoothing=True)),
        (Recipe("int8-weight"), Recipe("int8-weight")),
        (Recipe("int8-dynamic"), Recipe("int8-dynamic")),
    ],
    ids=str,
)
def test_a_recipe_takes_from_training_what_it_leaves_open(recipe: Recipe, resolved: Recipe) -> None:
    assert recipe.resolved(WeightRounding("int4-weight", 32)) == resolved
    assert recipe.resolved(None) == recipe


@pytest.mark.parametrize("precision", PER_CHANNEL)
def test_weights_trained_for_one_int8_product_serve_the_other(precision: str) -> None:
    for trained in PER_CHANNEL:
        assert Recipe(precision).resolved(WeightRounding(trained)) == Recipe(precision, solver="rtn")
    assert Recipe("int8-weight").resolved(WeightRounding(precision)) == Recipe("int8-weight")
    seven_bits = Recipe(precision, reduce_range=True)  # a grid that the weights have not learned
    assert seven_bits.resolved(WeightRounding(precision)) == seven_bits
    assert seven_bits.solver_for(precision, WeightRounding(precision)) == ("gptq", None)


def test_a_mixture_rounds_what_was_trained_for_it_to_the_nearest_and_solves_the_rest(fine_tuned: Path) -> None:
    exporter = open_exporter(fine_tuned, calibration=Calibration(windows=8))
    names = dict.fromkeys(exporter.evidence.linears, "int8-weight") | {"head": "int4-weight"}
    formats = exporter.evidence.formats(Recipe("auto", max_size=1), names)
    for linear, plain in exporter.evidence.linears.items():
        weight = plain.weight
        if linear == "head":
            expected = blocks.round_to_nearest(weight.T, 4, 256)
        else:
            expected = refined_gptq(weight.T, 8, blocks.BLOCK_SIZE[8], exporter.evidence.moments[linear])
        np.testing.assert_array_equal(formats[linear].store(linear, weight).restored(), expected.restored().T)


# Bad input.

PRECISIONS = ", ".join(sorted(WEIGHT_BITS))
#: What follows `train --out out --from CHECKPOINT`, and the beginning of what is said about it.
REFUSALS = {
    "unknown precision": (
        ("--quantization-aware", "int4-wait"),
        f"unknown quantization-aware precision 'int4-wait'; did you mean 'int4-weight'? available: {PRECISIONS}; "
        "change --quantization-aware",
    ),
    "float precision": (
        ("--quantization-aware", "float32"),
        f"float32 has no integer weights to train for; available: {PRECISIONS}; change --quantization-aware",
    ),
    "block size of channels": (
        ("--quantization-aware", "int8-dynamic", "--block-size", "64"),
        "--block-size is for int8-weight and int4-weight; int8-dynamic has a scale for each row",
    ),
    "odd block size": (
        ("--quantization-aware", "int4-weight", "--block-size", "48"),
        "--block-size is 48; onnxruntime takes 16, 32, 64, 128, 256",
    ),
    "block size for nothing": (
        ("--block-size", "64"),
        "block_size is 64, but nothing is rounded; give --quantization-aware too",
    ),
    "another model": (
        ("--hidden-size", "32"),
        "hidden_size is 32, but 64 in the run of {checkpoint}; drop the option, or --from",
    ),
    "a preset": (
        ("--preset", "small"),
        "--preset small has no meaning with --from, whose settings hold; drop it",
    ),
    "resuming": (("--resume",), "--from starts a new run and --resume continues one; drop one of them"),
}


def test_settings_refuse_what_cannot_be_rounded_to() -> None:
    with pytest.raises(ConfigError, match="unknown quantization-aware precision 'int3-weight'"):
        TrainSettings(from_checkpoint="somewhere", quantization_aware="int3-weight")
    with pytest.raises(ConfigError, match="quantization_aware is 4; it must be text; change `quantization_aware`"):
        make_settings(flags={"from_checkpoint": "somewhere", "quantization_aware": 4})


@pytest.mark.parametrize("case", REFUSALS)
def test_fine_tuning_that_cannot_be(case: str, checkpoint: Path) -> None:
    options, message = REFUSALS[case]

    assert refused("train", "--out", "out", "--from", checkpoint, *options) == message.format(checkpoint=checkpoint)


def test_nothing_to_start_from(packages: Path, tmp_path: Path) -> None:
    aware, package = ("train", "--out", "out", "--quantization-aware", "int4-weight"), packages / "float32"

    assert refused(*aware) == "--quantization-aware int4-weight fine-tunes a checkpoint; name it by --from"
    assert refused(*aware, "--from", "none") == "none: no such checkpoint directory"
    assert refused(*aware, "--from", package) == (
        f"{package} is a package, not a checkpoint; give the directory that train wrote"
    )
    assert refused(*aware, "--from", tmp_path).startswith(f"{tmp_path}: no config.json in it")


def test_what_it_starts_from_is_never_replaced(checkpoint: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(checkpoint, tmp_path / "mine", ignore=shutil.ignore_patterns("trainer"))

    assert refused("train", "--from", mine, "--out", "mine", "--force") == (
        "mine holds the checkpoint of --from; choose another --out"
    )


def test_a_run_is_resumed_for_what_it_was_started_for(checkpoint: Path, fine_tuned: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(fine_tuned, tmp_path / "mine")

    assert refused(
        "train", "--out", "mine", "--resume", "--quantization-aware", "int8-weight", "--block-size", 256
    ) == ("quantization_aware is int8-weight, but int4-weight in the run of mine; drop the option, or --resume")
    with pytest.raises(ConfigError, match=r"from_checkpoint is None, but \S+ in the run of"):
        train(dataclasses.replace(settings_from(checkpoint), from_checkpoint=None), mine, resume=True)


def test_a_record_that_names_no_rounding_is_damaged(fine_tuned: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(fine_tuned, tmp_path / "mine", ignore=shutil.ignore_patterns("trainer"))
    record = json.loads((mine / "training.json").read_text())
    record["settings"]["quantization_aware"] = "int3-weight"
    (mine / "training.json").write_text(json.dumps(record))

    with pytest.raises(CheckpointError, match=r"mine: damaged training.json \(unknown quantization-aware precision"):
        load_checkpoint(mine)


def test_the_command_line_fine_tunes_and_resumes(checkpoint: Path, tmp_path: Path) -> None:
    options = (
        "--quantization-aware",
        "int4-weight",
        "--block-size",
        "32",
        "--max-steps",
        "2",
        "--learning-rate",
        "1e-5",
    )

    result = succeed("train", "--from", checkpoint, *options, "--out", "out", "--json", "report.json")

    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads((tmp_path / "out" / "training.json").read_text())
    assert report["settings"]["hidden_size"] == 64
    assert report["settings"]["learning_rate"] == 1e-5
    assert result.stdout.startswith(f"out: {report['parameters']:,} parameters, last loss 0.")
    succeed("train", "--resume", "--out", "out", "--max-steps", "4")
    assert json.loads((tmp_path / "out" / "training.json").read_text())["settings"]["max_steps"] == 4
