"""Bad input to `train`: one line that says what to change, exit code 2, and nothing written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from expe_edge.text.corpus import load_corpus
from expe_edge.training.settings import TrainSettings
from tests.command_line import QUICK, refused, succeed, write_text
from tests.damage import ENCODINGS

pytestmark = pytest.mark.usefixtures("elsewhere")


TRAIN_REFUSALS: list[tuple[list[str], str]] = [
    (["--preset", "tinny"], "unknown preset 'tinny'; did you mean 'tiny'? available: base, small, tiny"),
    (
        ["--positional", "exqp"],
        f"unknown positional encoding 'exqp'; did you mean 'exqpe'? available: {ENCODINGS}",
    ),
    (
        ["--positional-parameter", "stp=1"],
        "unknown parameter of positional encoding 'expe' 'stp'; did you mean 'step'? "
        "available: content_heads, dims, how, slopes, softplus, start, step, temperature, where",
    ),
    (
        ["--positional-parameter", "step"],
        "--positional-parameter 'step': expected KEY=VALUE, such as step=0.0078125",
    ),
    (
        ["--positional-parameter", "where=keys"],
        "unknown where 'keys'; did you mean 'key'? available: embedding, key, query_key, query_key_value",
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
