"""Bad input: one line that says what to change, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from expe_edge.corpus import Document, load_corpus
from expe_edge.errors import CheckpointError
from expe_edge.package import MANIFEST_FILE, read_package, seal_package
from expe_edge.runtime import Generator
from expe_edge.settings import TrainSettings
from expe_edge.tokenization import train_tokenizer
from expe_edge.training import disk_full_is_an_error
from tests.command_line import QUICK, command, invoke, refused, succeed, tree, write_text

ENCODINGS = "alibi, expe, exqpe, none, relative, rotary, sinusoidal"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty directory, where anything written would show."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def own_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("trainer")))


@pytest.fixture
def own_package(packages: Path, tmp_path: Path) -> Path:
    """A copy of the float32 package, to be damaged."""
    return Path(shutil.copytree(packages / "float32", tmp_path / "package"))


# Checkpoints


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Return what changes the bytes of one file of a directory."""

    def apply(directory: Path) -> None:
        (directory / name).write_bytes(change((directory / name).read_bytes()))

    return apply


def remove(name: str) -> Callable[[Path], None]:
    """Return what removes one file of a directory."""
    return lambda directory: (directory / name).unlink()


def set_json(name: str, **changes: Any) -> Callable[[Path], None]:
    """Return what changes entries of a JSON file of a directory."""
    return rewrite(name, lambda data: json.dumps({**json.loads(data), **changes}).encode())


UNFINISHED = "{path}: no %s in it, so not a finished checkpoint; run train, or --resume it"
CONFIG_KEYS = (
    "bos_token_id, eos_token_id, hidden_act, hidden_size, initializer_range, intermediate_size, "
    "max_position_embeddings, num_attention_heads, num_hidden_layers, num_key_value_heads, pad_token_id, positional, "
    "positional_parameters, rms_norm_eps, tie_word_embeddings, training_length, use_cache, vocab_size"
)
#: Damage to a checkpoint, and the beginning of what is said about it.
DAMAGED_CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (shutil.rmtree, "{path}: no such checkpoint directory"),
    "no config": (remove("config.json"), UNFINISHED % "config.json"),
    "no weights": (remove("model.safetensors"), UNFINISHED % "model.safetensors"),
    "no record": (remove("training.json"), UNFINISHED % "training.json"),
    "no tokenizer": (remove("tokenizer.json"), "{path}: no tokenizer.json in it"),
    "half the weights": (
        rewrite("model.safetensors", lambda data: data[: len(data) // 2]),
        "{path}: model.safetensors is damaged or truncated (",
    ),
    "weights' last byte": (
        rewrite("model.safetensors", lambda data: data[:-1]),
        "{path}: model.safetensors is damaged or truncated (",
    ),
    "empty weights": (
        rewrite("model.safetensors", lambda _: b""),
        "{path}: model.safetensors is damaged or truncated (",
    ),
    "half the config": (
        rewrite("config.json", lambda data: data[:99]),
        "{path}: damaged config.json or training.json (",
    ),
    "half the record": (
        rewrite("training.json", lambda data: data[:99]),
        "{path}: damaged config.json or training.json (",
    ),
    "config a list": (rewrite("config.json", lambda _: b"[]"), "{path}: damaged config.json or training.json ("),
    "record a list": (rewrite("training.json", lambda _: b"[]"), "{path}: damaged config.json or training.json ("),
    "record empty": (
        rewrite("training.json", lambda _: b"{}"),
        "{path}: damaged config.json or training.json (",
    ),
    "half the tokenizer": (
        rewrite("tokenizer.json", lambda data: data[:999]),
        "{path}/tokenizer.json: not a tokenizer (",
    ),
    "another model": (
        set_json("config.json", model_type="llama"),
        "{path}: model_type is 'llama', not 'expe'; not made by expe-edge",
    ),
    "other sizes": (
        set_json("config.json", num_hidden_layers=3),
        "{path}: model.safetensors does not fit config.json (first difference: blocks.2.",
    ),
    "other widths": (set_json("config.json", intermediate_size=8), "{path}: model.safetensors "),
    "unknown config key": (
        set_json("config.json", hidden_sise=3),
        f"unknown config key 'hidden_sise'; did you mean 'hidden_size'? available: {CONFIG_KEYS}",
    ),
    "unknown encoding": (
        set_json("config.json", positional="rotery"),
        f"unknown positional encoding 'rotery'; did you mean 'rotary'? available: {ENCODINGS}",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_CHECKPOINTS)
def test_damaged_checkpoint(own_checkpoint: Path, damage: str) -> None:
    apply, message = DAMAGED_CHECKPOINTS[damage]
    apply(own_checkpoint)

    found = refused("export", own_checkpoint, "--out", "out", "--precision", "int8-dynamic")

    assert found.startswith(message.format(path=own_checkpoint))
    assert message.endswith(("(", "blocks.2.", " ")) or found == message.format(path=own_checkpoint)


def test_checkpoint_with_a_tokenizer_of_another_vocabulary(own_checkpoint: Path) -> None:
    train_tokenizer([Document("a", "text " * 99)], 257).save(str(own_checkpoint / "tokenizer.json"))
    message = f"{own_checkpoint}: the tokenizer has 257 tokens, the model's vocabulary 300; they do not belong together"

    assert refused("export", own_checkpoint, "--out", "out") == message
    assert refused("compare", own_checkpoint) == message


@pytest.mark.parametrize("precision", ["float32", "int8-dynamic", "int8-static"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "name", ["embedding.weight", "blocks.1.attention.qkv.weight", "blocks.0.feed_forward.up.weight"]
)
def test_weights_that_are_no_numbers(own_checkpoint: Path, name: str, value: float, precision: str) -> None:
    """The last value of a tensor: in the embedding that is a token which no validation text need hold."""
    weights = load_file(own_checkpoint / "model.safetensors")
    weights[name].view(-1)[-1] = value
    save_file(weights, own_checkpoint / "model.safetensors", metadata={"format": "pt"})

    assert refused("export", own_checkpoint, "--out", "out", "--precision", precision) == (
        f"weight {name!r} holds NaN or infinite values; train again, or export an earlier step"
    )


# Export


@pytest.mark.parametrize("precisions", [["int8-static"], ["float32", "int8-static"]], ids="+".join)
def test_calibration_text_shorter_than_a_window(checkpoint: Path, precisions: list[str]) -> None:
    """Also the packages before the one at fault are not written."""
    text = write_text("short.txt", "the bright river runs under the old stone and the tree grows over.")
    options = [option for precision in precisions for option in ("--precision", precision)]

    found = refused("export", checkpoint, "--out", "out", *options, "--calibration-data", text)

    assert re.fullmatch(
        r"the calibration text has \d\d tokens, less than one window of 32; give more with --calibration-data", found
    )


EXPORT_REFUSALS: list[tuple[list[str], str]] = [
    (
        ["--precision", "int8-dinamic"],
        "unknown precision 'int8-dinamic'; did you mean 'int8-dynamic'? available: auto, bfloat16, float16, float32, "
        "int4-weight, int8-dynamic, int8-static, int8-weight; change --precision",
    ),
    (
        ["--positions", "fold"],
        "unknown positions 'fold'; did you mean 'folded'? available: folded, inline; change --positions",
    ),
    (
        ["--precision", "int8-static", "--calibration-method", "min-max"],
        "unknown calibration method 'min-max'; did you mean 'minmax'? "
        "available: entropy, minmax, output-error, percentile; change --calibration-method",
    ),
    (["--precision", "int8-static", "--calibration-windows", "0"], "--calibration-windows is 0; at least 1"),
]


@pytest.mark.parametrize(("options", "message"), EXPORT_REFUSALS, ids=lambda value: value[-2] if value else "")
def test_export_options_that_are_unknown(checkpoint: Path, options: list[str], message: str) -> None:
    assert refused("export", checkpoint, "--out", "out", *options) == message


def test_calibration_text_that_is_missing(checkpoint: Path) -> None:
    found = refused(
        "export", checkpoint, "--out", "out", "--precision", "int8-static", "--calibration-data", "gone.txt"
    )

    assert found.endswith("data gone.txt: no such file or folder")


def test_export_does_not_replace_a_package(checkpoint: Path) -> None:
    """Neither the one that exists nor those before it are written."""
    Path("out/int8-dynamic").mkdir(parents=True)

    found = refused("export", checkpoint, "--out", "out", "--precision", "float32", "--precision", "int8-dynamic")

    assert found == "out/int8-dynamic exists; use --force to replace it, or another --out"


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
@pytest.mark.parametrize("out", ["a-file", "a-folder"])
def test_export_into_a_file(checkpoint: Path, out: str, force: list[str]) -> None:
    write_text("a-file", "a file of the user's")
    Path("a-folder").mkdir()
    write_text("a-folder/float32", "another")

    refused("export", checkpoint, "--out", out, *force)


# Generate


DAMAGED_PACKAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (shutil.rmtree, "{path}: no such package directory"),
    "no manifest": (
        remove(MANIFEST_FILE),
        "{path}: no expe_edge.json in it, so not a package; make one with export",
    ),
    "newer": (
        set_json(MANIFEST_FILE, format_version=3),
        "{path}/expe_edge.json: format version 3, newer than 2, the newest this release reads; upgrade expe-edge",
    ),
    "half the manifest": (
        rewrite(MANIFEST_FILE, lambda data: data[: len(data) // 2]),
        "{path}/expe_edge.json: not a manifest of expe-edge; export the package again",
    ),
    "edited manifest": (
        set_json(MANIFEST_FILE, precision="int8-static"),
        "{path}/expe_edge.json: changed since it was written (its digest differs); export the package again",
    ),
    "half the model": (
        rewrite("model.onnx", lambda data: data[: len(data) // 2]),
        "{path}: model.onnx differs from its hash in expe_edge.json; export the package again",
    ),
    "changed config": (
        rewrite("config.json", lambda data: data + b"\n"),
        "{path}: config.json differs from its hash in expe_edge.json; export the package again",
    ),
    "no model": (
        remove("model.onnx"),
        "{path}: model.onnx is missing; the package is incomplete, export it again",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_PACKAGES)
@pytest.mark.parametrize("command", ["generate", "compare"])
def test_damaged_package(own_package: Path, packages: Path, command: str, damage: str) -> None:
    apply, message = DAMAGED_PACKAGES[damage]
    apply(own_package)
    arguments = ["--prompt", "the"] if command == "generate" else [packages / "int8-dynamic"]
    if command == "compare" and damage == "missing":
        message = "{path}: neither a package (no expe_edge.json) nor a checkpoint (no config.json)"
    if command == "compare" and damage == "no manifest":  # what is left has a config.json, so it could be a checkpoint
        message = "{path}: no model.safetensors in it, so not a finished checkpoint; run train, or --resume it"

    assert refused(command, own_package, *arguments) == message.format(path=own_package)


def test_checkpoint_in_place_of_a_package(checkpoint: Path) -> None:
    assert refused("generate", checkpoint, "--prompt", "the") == (
        f"{checkpoint}: no expe_edge.json in it, so not a package; make one with export"
    )


def test_package_with_a_tokenizer_of_another_vocabulary(own_package: Path) -> None:
    manifest = read_package(own_package).manifest
    train_tokenizer([Document("a", "text " * 99)], 257).save(str(own_package / "tokenizer.json"))
    (own_package / MANIFEST_FILE).unlink()
    seal_package(own_package, manifest)

    assert refused("generate", own_package, "--prompt", "the") == (
        f"{own_package}/tokenizer.json has 257 tokens, the model's vocabulary 300; they do not belong together, "
        "export again"
    )


@pytest.mark.parametrize("options", [["--prompt", ""], ["--prompt-file", "empty.txt"], []], ids=["", "file", "stdin"])
def test_empty_prompt(packages: Path, options: list[str]) -> None:
    write_text("empty.txt", "")

    assert refused("generate", packages / "float32", *options) == (
        "the prompt is empty; give --prompt, --prompt-file or text on standard input"
    )


def test_prompt_longer_than_the_cache(packages: Path) -> None:
    tokens = len(Generator.load(packages / "float32").encode("the old tree"))

    found = refused("generate", packages / "float32", "--prompt", "the old tree", "--cache-length", "4")

    assert found == (
        f"the prompt's {tokens} tokens and 256 new ones need a cache of {tokens + 256}, but --cache-length is 4; "
        "raise it, or shorten the prompt"
    )


GENERATE_REFUSALS: list[tuple[list[str], str]] = [
    (
        ["--device", "cuda"],
        "--device cuda: this onnxruntime has no CUDAExecutionProvider; install onnxruntime-gpu on a machine with a "
        "GPU, or use --device cpu",
    ),
    (["--device", "gpu"], "unknown device 'gpu'; available: cpu, cuda; change --device"),
    (["--max-new-tokens", "0"], "--max-new-tokens is 0; at least 1"),
    (["--temperature", "-1"], "--temperature is -1.0; it must be at least 0"),
    (["--top-p", "0"], "--top-p is 0.0; it must be above 0 and at most 1"),
    (["--seed", "-1"], "--seed is -1; it must be at least 0"),
    (["--threads", "0"], "--threads is 0; at least 1"),
    (["--prompt-file", "x"], "both --prompt and --prompt-file are given; use one"),
    (["--cache-length", "20000000"], "20000000 tokens exceed the 16777216 positions of this model's encoding"),
]


@pytest.mark.parametrize(("options", "message"), GENERATE_REFUSALS, ids=lambda value: value[0] if value else "")
def test_generate_options_out_of_range(packages: Path, options: list[str], message: str) -> None:
    assert refused("generate", packages / "float32", "--prompt", "the", *options) == message


def test_prompt_file_that_cannot_be_read(packages: Path) -> None:
    Path("latin.txt").write_bytes(b"caf\xe9")

    assert refused("generate", packages / "float32", "--prompt-file", "latin.txt") == (
        "--prompt-file latin.txt: not UTF-8 text"
    )
    assert refused("generate", packages / "float32", "--prompt-file", "gone.txt") == (
        "--prompt-file gone.txt: No such file or directory"
    )
    assert refused("generate", packages / "float32", "--prompt-file", ".") == "--prompt-file .: Is a directory"


@pytest.mark.parametrize("data", [b"caf\xe9", b"\xff\xfe"])
def test_prompt_on_standard_input_that_is_not_utf8(packages: Path, data: bytes) -> None:
    assert refused("generate", packages / "float32", stdin=data).endswith(" not UTF-8 text")


@pytest.mark.parametrize("options", [[], ["--prompt", "caf\udce9"]], ids=["stdin", "argument"])
def test_prompt_that_is_not_utf8_where_the_locale_lets_bytes_through(packages: Path, options: list[str]) -> None:
    """In the C locale Python hands on bytes that are no text as halves of surrogate pairs."""
    done = subprocess.run(
        [os.fsencode(part) for part in command("generate", packages / "float32", *options)],
        input=b"caf\xe9",
        capture_output=True,
        check=False,
        timeout=60,
        env={**os.environ, "LC_ALL": "C"},
    )

    assert (done.returncode, done.stdout) == (2, b""), done.stderr
    assert re.fullmatch(rb"Error: [^\n]+ not UTF-8 text\n", done.stderr)


# Compare


def test_same_model_twice(packages: Path) -> None:
    path = packages / "float32"

    assert refused("compare", path, path) == "the same model is given twice"
    assert refused("compare", path, packages / "int8-static" / ".." / "float32") == "the same model is given twice"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "1,1"], "--lengths 1,1: expected rising positive integers, as 1,2,4,8,16"),
        (["--lengths", "0"], "--lengths 0: expected rising positive integers, as 1,2,4,8,16"),
        (["--lengths", "1,b"], "--lengths 1,b: expected comma-separated integers, such as 1,2,4,8,16"),
        (["--lengths", ""], "--lengths : expected comma-separated integers, such as 1,2,4,8,16"),
        (["--documents", "0"], "--documents is 0; at least 1"),
        (["--data", "gone.txt"], "--data gone.txt: no such file or folder"),
        (["--threads", "0"], "--threads is 0; at least 1"),
    ],
)
def test_compare_options_out_of_range(packages: Path, options: list[str], message: str) -> None:
    outputs = ["--json", "figures.json", "--plot", "plot.png"]

    assert refused("compare", packages / "float32", packages / "int8-static", *options, *outputs) == message


def test_no_document_is_long_enough(packages: Path) -> None:
    found = refused("compare", packages / "float32", "--lengths", "1,400", "--json", "figures.json")

    assert found.startswith("no document of 12801 tokens (the longest has ")
    assert found.endswith("); lower --lengths, or give longer text with --data")


def test_plot_of_an_unknown_kind_is_refused_before_the_work(packages: Path) -> None:
    refused("compare", packages / "float32", packages / "int8-static", "--plot", "plot.xyz", "--json", "figures.json")


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_output_that_is_a_folder_is_refused_before_the_work(packages: Path, option: str) -> None:
    Path("folder.png").mkdir()

    refused("compare", packages / "float32", packages / "int8-static", option, "folder.png")


# Train


TRAIN_REFUSALS: list[tuple[list[str], str]] = [
    (["--preset", "tinny"], "unknown preset 'tinny'; did you mean 'tiny'? available: base, small, tiny"),
    (
        ["--positional", "exqp"],
        f"unknown positional encoding 'exqp'; did you mean 'exqpe'? available: {ENCODINGS}",
    ),
    (
        ["--positional-parameter", "stp=1"],
        "unknown parameter of positional encoding 'expe' 'stp'; did you mean 'step'? "
        "available: dims, how, start, step, where",
    ),
    (
        ["--positional-parameter", "step"],
        "--positional-parameter 'step': expected KEY=VALUE, such as step=0.0078125",
    ),
    (
        ["--positional-parameter", "where=keys"],
        "unknown where 'keys'; available: embedding, query_key, query_key_value",
    ),
    (["--max-steps", "0"], "max_steps is 0; it must be above 0; change --max-steps"),
    (["--vocab-size", "10"], "vocab_size is 10; at least 257: 256 bytes and <|endoftext|>"),
    (["--data", "gone.txt"], "--data gone.txt: no such file or folder"),
    (["--hidden-size", "33"], "hidden_size 33 is not a multiple of num_attention_heads 2"),
    (["--resume"], "out: no run to resume (no readable training.json); drop --resume"),
]


@pytest.mark.parametrize(("options", "message"), TRAIN_REFUSALS, ids=lambda value: value[-1] if value else "")
def test_train_options_that_cannot_be(text_folder: Path, options: list[str], message: str) -> None:
    assert refused("train", "--data", text_folder, "--out", "out", *QUICK, *options) == message


def test_unknown_key_in_the_config_file(text_folder: Path) -> None:
    config = write_text("run.yaml", "learning_rat: 0.1\n")
    keys = ", ".join(sorted(TrainSettings.__dataclass_fields__))

    assert refused("train", "--data", text_folder, "--out", "out", "--config", config) == (
        f"unknown config key 'learning_rat'; did you mean 'learning_rate'? available: {keys}"
    )


def test_training_text_shorter_than_a_sequence() -> None:
    text = write_text("short.txt", "the bright river runs under the old stone and the tree grows over.")

    found = refused("train", "--data", text, "--out", "out", "--training-length", "256")

    assert re.fullmatch(
        r"the training text has \d+ tokens, less than one sequence of 256; add --data or lower --training-length", found
    )


def test_text_shorter_than_a_sequence_leaves_the_old_checkpoint(own_checkpoint: Path) -> None:
    text = write_text("short.txt", "the bright river runs under the old stone and the tree grows over.")

    refused("train", "--data", text, "--out", own_checkpoint, "--force", "--training-length", "256")


def test_one_document_is_trained_on_whichever_half_it_falls_in(text_folder: Path) -> None:
    held_out = load_corpus([str(text_folder)]).held_out[0]

    succeed("train", "--data", held_out.name, "--out", "out", *QUICK, "--max-steps", "1")


def test_train_does_not_replace_a_checkpoint(own_checkpoint: Path, text_folder: Path) -> None:
    assert refused("train", "--data", text_folder, "--out", own_checkpoint) == (
        f"{own_checkpoint} exists; use --force to replace it, --resume to continue it, or another --out"
    )


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_train_does_not_replace_a_file(text_folder: Path, force: list[str]) -> None:
    write_text("a-file", "a file of the user's")

    refused("train", "--data", text_folder, "--out", "a-file", *QUICK, "--max-steps", "1", *force)


def test_resume_with_other_sizes(checkpoint: Path) -> None:
    shutil.copytree(checkpoint, "out")

    refused("train", "--resume", "--out", "out", "--hidden-size", "128", "--max-steps", "61")


# No space left


def full_device(folder: Path) -> Path:
    """A file that is always full: a link, so that whoever replaces it does not replace the device."""
    path = folder / "full"
    path.symlink_to("/dev/full")
    return path


def test_full_device_for_the_figures(packages: Path, tmp_path: Path) -> None:
    full = full_device(tmp_path)
    before = tree(tmp_path)

    result = invoke("compare", packages / "float32", "--lengths", "1", "--documents", "1", "--json", full)

    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: no space left on the device; ")
    assert tree(tmp_path) == before


def test_full_device_for_the_text(packages: Path) -> None:
    arguments = command("generate", packages / "float32", "--prompt", "the")

    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, check=False, timeout=60)

    assert done.returncode == 2
    assert re.fullmatch(rb"Error: no space left on the device; [^\n]+\n", done.stderr)


@pytest.mark.parametrize("kind", ["text", "tokenizer"])
def test_full_device_for_a_checkpoint(tmp_path: Path, kind: str) -> None:
    """Each library that writes a part of a checkpoint tells of a full disk by an exception of its own."""
    full = full_device(tmp_path)
    writers: dict[str, Callable[[], object]] = {
        "text": lambda: full.write_text("x"),
        "tokenizer": lambda: train_tokenizer([Document("a", "text " * 99)], 257).save(str(full)),
    }

    with pytest.raises(CheckpointError) as caught, disk_full_is_an_error(tmp_path):
        writers[kind]()

    assert str(caught.value) == f"{tmp_path}: no space left on the device; free some or change --out"


def test_other_failures_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_full_is_an_error(tmp_path):
        (tmp_path / "none").read_text()
