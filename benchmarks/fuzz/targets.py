"""What `benchmarks.fuzz` gives changed inputs to: one function for each kind of input."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.fuzz.checkpoints import changed_file, tokenizer, tokenizer_settings, weights_file
from benchmarks.fuzz.generating import constraints, generate_options, prompts, sampling
from benchmarks.fuzz.options import options
from benchmarks.fuzz.packages import contract, graph, manifest
from benchmarks.fuzz.training import positions, settings_file, text_files
from benchmarks.fuzz.trial import Trial

TARGETS: dict[str, Callable[[Trial], object]] = {
    "manifest": manifest,
    "contract": contract,
    "graph": graph,
    "config": changed_file("config.json"),
    "training record": changed_file("training.json"),
    "trainer state": changed_file("trainer/checkpoint-2/trainer_state.json"),
    "weights": weights_file,
    "tokenizer": tokenizer,
    "tokenizer settings": tokenizer_settings,
    "settings": settings_file,
    "positions": positions,
    "text": text_files,
    "sampling": sampling,
    "generate options": generate_options,
    "constraints": constraints,
    "prompts": prompts,
    "options": options,
}
