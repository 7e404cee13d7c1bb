"""Quantization-aware fine-tuning: rounding exactly as an export does, learning through it, an ordinary checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file

from expe_edge.checkpoint import load_checkpoint, starting_settings
from expe_edge.errors import CheckpointError, ConfigError
from expe_edge.export.contract import graph_feeds
from expe_edge.export.exporter import export, open_exporter
from expe_edge.export.fold import extract_weights
from expe_edge.export.graph import HEAD, build_graph, graph_contract
from expe_edge.export.source import open_source
from expe_edge.export.weights import ModelWeights
from expe_edge.modeling import ExPEForCausalLM
from expe_edge.package import read_package
from expe_edge.positional import ExPE
from expe_edge.quant import blocks
from expe_edge.quant.calibration import Calibration
from expe_edge.quant.channels import quantize_channels
from expe_edge.quant.formats import Float32, FormatOptions, make_format
from expe_edge.quant.recipe import WEIGHT_BITS, Recipe, WeightRounding
from expe_edge.quant.solvers import BlockQuantizer, refined_gptq
from expe_edge.quant.tables import EMBEDDING_FORMATS
from expe_edge.quantization_aware import FakeQuantizer, distillation_loss, round_to_nearest, round_weights
from expe_edge.settings import TrainSettings, make_settings
from expe_edge.tokenization import encode_documents
from expe_edge.training import train
from tests.command_line import refused, succeed, tree
from tests.graphs import normal, run_text, watched
from tests.small import small_settings
from tests.strategies import random_model, random_tokens, small_config

#: A rounding of each kind; the small models' rows end inside a block.
ROUNDINGS = (
    *(WeightRounding("int4-weight", size) for size in (16, 64)),
    WeightRounding("int8-weight", 128),
    WeightRounding("int8-dynamic"),
    WeightRounding("int8-static"),
)
#: Models that differ in what is rounded: position columns or none, tied or not.
MODELS: dict[str, dict[str, Any]] = {
    "expe": {"positional_parameters": {"dims": 8}},
    "expe in values": {"positional_parameters": {"dims": 8, "where": "query_key_value"}},
    "expe added": {"positional_parameters": {"dims": 8, "how": "add"}},
    "exqpe": {"positional": "exqpe", "positional_parameters": {"dims": 12, "limb_bits": 2}},
    "rotary": {"positional": "rotary"},
    "tied": {"tie_word_embeddings": True},
}


def settings_from(checkpoint: Path, **flags: Any) -> TrainSettings:
    """Settings of a run that starts from a checkpoint, as the command line makes them."""
    return make_settings(flags=flags, stored=starting_settings(checkpoint))


def rounded(model: ExPEForCausalLM, rounding: WeightRounding) -> ExPEForCausalLM:
    """A copy of the model that computes with its weights rounded."""
    model = copy.deepcopy(model)
    round_weights(model, rounding)
    return model


def stored(weights: ModelWeights, rounding: WeightRounding) -> ModelWeights:
    """The weights that `export --solver rtn` stores, restored."""
    kind = make_format(rounding.precision, FormatOptions(blocks=BlockQuantizer("rtn", rounding.block_size)))
    layers = [
        dataclasses.replace(
            layer,
            **{name: kind.restored(f"{index}.{name}", getattr(layer, name)) for name in ("qkv", "out", "up", "down")},
        )
        for index, layer in enumerate(weights.layers)
    ]
    tied = weights.config.tie_word_embeddings
    table = kind.table(HEAD, weights.head) if tied else EMBEDDING_FORMATS[kind.embedding](weights.embedding, None)
    head = kind.restored(HEAD, weights.head)
    return dataclasses.replace(weights, layers=tuple(layers), head=head, embedding=table.restored())


def seen(model: ExPEForCausalLM) -> ModelWeights:
    """The weights that a model computes with, rounded or not; what it adds for positions beside them."""
    weights, positional = extract_weights(model, folded=True), model.positional
    layers = []
    for block, layer in zip(model.blocks, weights.layers, strict=True):
        content = block.attention.qkv.weight
        if isinstance(positional, ExPE):
            content = positional.fold(content).content
        products = (block.attention.out, block.feed_forward.up, block.feed_forward.down)
        out, up, down = (product(torch.eye(product.in_features)).numpy() for product in products)
        layers.append(dataclasses.replace(layer, qkv=positional.stored(content).T.numpy(), out=out, up=up, down=down))
    head = model.head(torch.eye(model.head.in_features)).numpy()
    embedding = model.embedding(torch.arange(model.config.vocab_size)).numpy()
    return dataclasses.replace(weights, layers=tuple(layers), head=head, embedding=embedding)


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


# Rounding.

#: Weights of almost any size a float32 can have, and small integers, among which the largest is rarely alone.
matrices = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=20),
    elements=st.floats(-(2.0**120), 2.0**120, width=32) | st.integers(-3, 3).map(float),
)


def bytes_of(matrix: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(matrix).view(np.uint32)


@given(matrix=matrices, bits=st.sampled_from((4, 8)), block_size=st.sampled_from((3, 8, 16)))
def test_blocks_are_rounded_bit_for_bit_as_numpy_does(matrix: np.ndarray, bits: int, block_size: int) -> None:
    ours = round_to_nearest(torch.from_numpy(matrix), bits, block_size).numpy()

    theirs = blocks.round_to_nearest(matrix, bits, block_size).restored()
    np.testing.assert_array_equal(bytes_of(ours), bytes_of(theirs))


@given(matrix=matrices)
def test_rows_are_rounded_bit_for_bit_as_numpy_does(matrix: np.ndarray) -> None:
    ours = round_to_nearest(torch.from_numpy(matrix), 8, None).numpy()

    np.testing.assert_array_equal(bytes_of(ours), bytes_of(quantize_channels(matrix.T).restored().T))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_scales_of_weights_of_every_size_are_rounded_alike(bits: int, size: float) -> None:
    """Magnitudes for which scales are stored in half precision, and in float32."""
    matrix = normal(0, 300, 200) * np.float32(size)

    ours = round_to_nearest(torch.from_numpy(matrix), bits, 64).numpy()

    np.testing.assert_array_equal(bytes_of(ours), bytes_of(blocks.round_to_nearest(matrix, bits, 64).restored()))


def test_the_gradient_passes_straight_through() -> None:
    weight = torch.from_numpy(normal(0, 6, 40)).requires_grad_()
    upstream = torch.from_numpy(normal(1, 6, 40))

    (FakeQuantizer(4, 16)(weight) * upstream).sum().backward()

    torch.testing.assert_close(weight.grad, upstream, rtol=0, atol=0)


# The whole model.


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=lambda rounding: f"{rounding.precision}-{rounding.block_size}")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_forward_weights_are_those_that_an_export_stores(name: str, rounding: WeightRounding) -> None:
    model = random_model(small_config(**MODELS[name]))

    ours, theirs = seen(rounded(model, rounding)), stored(extract_weights(model, folded=True), rounding)

    for field in ("embedding", "head"):
        np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field), err_msg=field)
    for our_layer, their_layer in zip(ours.layers, theirs.layers, strict=True):
        for field in ("qkv", "out", "up", "down"):
            np.testing.assert_array_equal(getattr(our_layer, field), getattr(their_layer, field), err_msg=field)


@pytest.mark.parametrize("name", MODELS)
def test_the_forward_pass_is_the_exported_graphs(name: str) -> None:
    """Far past the training length too: slopes and positions are taken from float weights on both sides."""
    config, rounding = small_config(**MODELS[name]), WeightRounding("int4-weight", 16)
    model = random_model(config)
    (tokens,) = random_tokens(config, 280)

    graph = build_graph(stored(extract_weights(model, folded=True), rounding), Float32())
    theirs, _ = run_text(graph.model, graph_contract(config), tokens)

    with torch.no_grad():
        ours = rounded(model, rounding)(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()
    assert np.abs(ours - theirs).max() < 1e-3
    assert np.abs(model(input_ids=torch.from_numpy(tokens)[None]).logits[0].numpy() - theirs).max() > 0.1


@pytest.mark.parametrize("name", ["expe", "expe in values", "exqpe"])
def test_position_columns_stay_as_they_are(name: str) -> None:
    """A model whose content is rounded already computes the same when rounded again, however odd its positions."""
    rounding = WeightRounding("int4-weight", 16)
    model = random_model(small_config(**MODELS[name]))
    weights = stored(extract_weights(model, folded=True), rounding)
    rows, dims = model.positional.positioned_rows, model.positional.spec.dims
    model.embedding.weight.copy_(torch.from_numpy(weights.embedding))
    model.head.weight.copy_(torch.from_numpy(weights.head.T.copy()))
    for block, layer in zip(model.blocks, weights.layers, strict=True):
        content = torch.from_numpy(layer.qkv.T.copy())
        content[:rows, :dims] = block.attention.qkv.weight[:rows, :dims]
        block.attention.qkv.weight.copy_(content)
        block.attention.out.weight.copy_(torch.from_numpy(layer.out.T.copy()))
        block.feed_forward.up.weight.copy_(torch.from_numpy(layer.up.T.copy()))
        block.feed_forward.down.weight.copy_(torch.from_numpy(layer.down.T.copy()))
    tokens = torch.from_numpy(random_tokens(model.config, 40))

    torch.testing.assert_close(rounded(model, rounding)(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_learns(name: str) -> None:
    model = rounded(random_model(small_config(**MODELS[name])).requires_grad_(True), ROUNDINGS[0])
    tokens = torch.from_numpy(random_tokens(model.config, 20))

    model.train()(input_ids=tokens, labels=tokens).loss.backward()

    for parameter, values in model.named_parameters():
        assert values.grad is not None, parameter
        assert bool(values.grad.abs().sum() > 0), parameter


def test_rounding_leaves_parameters_and_their_names() -> None:
    model = random_model(small_config(tie_word_embeddings=True))
    before = {name: values.clone() for name, values in model.state_dict().items()}

    round_weights(model, ROUNDINGS[0])

    assert model.state_dict().keys() == before.keys()
    assert model.head.weight is model.embedding.weight
    for name, values in model.state_dict().items():
        torch.testing.assert_close(values, before[name], rtol=0, atol=0, msg=name)


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


@pytest.mark.parametrize("recipe", [Recipe("int4-weight", portable=True), Recipe("int8-static")], ids=str)
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
    ("recipe", "settled"),
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
def test_a_recipe_takes_from_training_what_it_leaves_open(recipe: Recipe, settled: Recipe) -> None:
    assert recipe.settled(WeightRounding("int4-weight", 32)) == settled
    assert recipe.settled(None) == recipe


def test_a_mixture_rounds_what_was_trained_for_it_to_the_nearest_and_solves_the_rest(fine_tuned: Path) -> None:
    exporter = open_exporter(fine_tuned, calibration=Calibration(windows=8))
    names = dict.fromkeys(exporter.evidence.plain.linears, "int8-weight") | {"head": "int4-weight"}
    formats = exporter.evidence.formats(Recipe("auto", max_size=1), names)
    for linear, plain in exporter.evidence.plain.linears.items():
        weight = plain.weight
        if linear == "head":
            expected = blocks.round_to_nearest(weight.T, 4, 256)
        else:
            expected = refined_gptq(weight.T, 8, blocks.BLOCK_SIZE[8], exporter.evidence.moments[linear])
        np.testing.assert_array_equal(formats[linear].restored(linear, weight), expected.restored().T)


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


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty directory, where anything written would show."""
    monkeypatch.chdir(tmp_path)


def test_settings_refuse_what_cannot_be_rounded_to() -> None:
    with pytest.raises(ConfigError, match="unknown quantization-aware precision 'int3-weight'"):
        TrainSettings(from_checkpoint="somewhere", quantization_aware="int3-weight")
    with pytest.raises(ConfigError, match="a setting has the wrong type: quantization_aware is 4, not str"):
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
