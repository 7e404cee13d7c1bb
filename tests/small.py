"""What tests and benchmarks share: a corpus and settings small enough to train in seconds, and a runner of commands."""

from __future__ import annotations

import random
from inspect import signature
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from expe_edge.training.settings import TrainSettings, make_settings

WORDS = ["the", "a", "tree", "river", "runs", "grows", "under", "over", "old", "bright", "stone", "and", "but"]


def small_settings(data: Path, **changes: object) -> TrainSettings:
    """Settings of a run of a few seconds on the documents in `data`."""
    values = {
        "data": (str(data),),
        "vocab_size": 300,
        "training_length": 32,
        "position_offset": 16,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_steps": 90,
        "batch_size": 8,
        "warmup_steps": 5,
        "save_every": 30,
        "log_every": 5,
    }
    return make_settings(flags={**values, **changes})


def write_documents(folder: Path) -> None:
    """Write forty documents of English-like words, each longer than 16 training lengths of 32 tokens."""
    generator = random.Random(0)
    for number in range(40):
        sentences = [" ".join(generator.choices(WORDS, k=8)) + "." for _ in range(60)]
        (folder / f"{number:02}.txt").write_text(f"Document {number}.\n" + "\n".join(sentences), encoding="utf-8")


def command_runner() -> CliRunner:
    """A runner of click commands that keeps stdout and stderr apart, which click did only when asked before 8.2."""
    asked: dict[str, Any] = {"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}
    return CliRunner(**asked)
