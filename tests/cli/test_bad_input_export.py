"""Bad input to `export`: one line that says what to change, exit code 2, and nothing written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from expe_edge.text.documents import Document
from expe_edge.text.tokenization import train_tokenizer
from expe_edge.training.checkpoint import load_checkpoint
from tests.command_line import refused, write_text
from tests.damage import ENCODINGS, remove, rewrite, set_json

pytestmark = pytest.mark.usefixtures("elsewhere")


# Checkpoints


UNFINISHED = "{path}: no %s in it, so not a finished checkpoint; run train, or --resume it"
CONFIG_KEYS = (
    "bos_token_id, eos_token_id, hidden_act, hidden_size, initializer_range, intermediate_size, "
    "max_position_embeddings, num_attention_heads, num_hidden_layers, num_key_value_heads, output_gate, "
    "pad_token_id, positional, positional_parameters, rms_norm_eps, tie_word_embeddings, training_length, use_cache, "
    "vocab_size"
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
    "other widths": (
        set_json("config.json", intermediate_size=8),
        "{path}: model.safetensors does not fit config.json (first difference: blocks.0.feed_forward.up.weight)",
    ),
    "unknown config key": (
        set_json("config.json", hidden_sise=3),
        f"unknown config key 'hidden_sise'; did you mean 'hidden_size'? available: {CONFIG_KEYS}",
    ),
    "unknown encoding": (
        set_json("config.json", positional="rotery"),
        f"unknown positional encoding 'rotery'; did you mean 'rotary'? available: {ENCODINGS}",
    ),
}


#: Values that a config cannot have, and what is said of each.
CONFIGS: list[tuple[dict[str, object], str]] = [
    ({"hidden_size": "64"}, "hidden_size is '64'; it must be a whole number"),
    ({"num_hidden_layers": []}, "num_hidden_layers is []; it must be a whole number"),
    ({"hidden_act": [[]]}, "hidden_act is [[]]; it must be text"),
    ({"pad_token_id": {"a": 0}}, "pad_token_id is {'a': 0}; it must be a whole number"),
    ({"positional_parameters": 5}, "positional_parameters is 5; it must be a mapping"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, not a whole number from 1 to 1024"),
    ({"hidden_size": 2**40}, "hidden_size is 1099511627776, not a whole number from 1 to 1048576"),
    ({"vocab_size": 2**40}, "vocab_size is 1099511627776, not a whole number from 1 to 1048576"),
    ({"initializer_range": -1}, "rms_norm_eps and initializer_range must not be negative"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS)
def test_config_of_other_kinds_or_out_of_bounds(own_checkpoint: Path, changes: dict[str, object], message: str) -> None:
    set_json("config.json", **changes)(own_checkpoint)

    assert refused("export", own_checkpoint, "--out", "out") == message


def test_config_of_a_larger_model_than_the_weights_allocates_nothing(own_checkpoint: Path) -> None:
    """A hundred terabytes, by the config."""
    set_json("config.json", hidden_size=2**20, num_attention_heads=1024, num_key_value_heads=1024)(own_checkpoint)

    assert refused("export", own_checkpoint, "--out", "out") == (
        f"{own_checkpoint}: model.safetensors does not fit config.json (first difference: embedding.weight)"
    )


@pytest.mark.parametrize("content", [b"{", b'{"pad_token_id": {}}', b"[" * 5000])
def test_files_that_nothing_of_ours_reads_do_no_harm(own_checkpoint: Path, content: bytes) -> None:
    for name in ("generation_config.json", "tokenizer_config.json", "adapter_config.json"):
        (own_checkpoint / name).write_bytes(content)

    load_checkpoint(own_checkpoint)


def test_what_transformers_writes_into_a_config_is_not_looked_at(own_checkpoint: Path) -> None:
    set_json("config.json", id2label=[], chunk_size_feed_forward="5", torch_dtype="x", problem_type=[])(own_checkpoint)

    load_checkpoint(own_checkpoint)


@pytest.mark.parametrize(
    "settings", [{"data": [["a"]]}, {"data": 5}, {"text_field": None}, {"quantization_aware": []}, {"block_size": "16"}]
)
def test_record_of_other_kinds(own_checkpoint: Path, settings: dict[str, object]) -> None:
    record = json.loads((own_checkpoint / "training.json").read_text(encoding="utf-8"))
    set_json("training.json", settings={**record["settings"], **settings})(own_checkpoint)

    message = refused("export", own_checkpoint, "--out", "out")
    assert message.startswith(f"{own_checkpoint}: damaged config.json or training.json (training.json.settings.")


@pytest.mark.parametrize("size", ["9" * 400, "1.5MB\x1b[2J\n"])
def test_sizes_that_are_none(checkpoint: Path, size: str) -> None:
    message = refused("export", checkpoint, "--out", "out", "--precision", "auto", "--max-size", size)

    assert message.endswith(": expected bytes, as 600kB or 1.5MB")


@pytest.mark.parametrize("damage", DAMAGED_CHECKPOINTS)
def test_damaged_checkpoint(own_checkpoint: Path, damage: str) -> None:
    apply, message = DAMAGED_CHECKPOINTS[damage]
    apply(own_checkpoint)

    found = refused("export", own_checkpoint, "--out", "out", "--precision", "int8-dynamic")

    assert found.startswith(message.format(path=own_checkpoint))
    assert message.endswith(("(", "blocks.2.")) or found == message.format(path=own_checkpoint)


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
