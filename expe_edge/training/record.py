"""What a run has written of itself, and whether another may go on from it."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerState

from expe_edge.errors import CheckpointError, ConfigError
from expe_edge.package.checks import MAPPING, list_of, record, whole
from expe_edge.text.corpus import absolute_source
from expe_edge.training.rounding import explicit_rounding
from expe_edge.training.settings import LARGEST_COUNT, TRAINER_DIRECTORY, TRAINING_FILE, TrainSettings, stored_settings

#: Settings that the weights of a run depend on.
MODEL_SETTINGS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "hidden_act", "output_gate", "tie_word_embeddings", "positional", "positional_parameters"),
    *("training_length", "max_position_embeddings"),
)
#: What a run starts from, what its weights are rounded to, and what they learn.
START_SETTINGS = ("from_checkpoint", "tokenizer", "quantization_aware", "block_size", "distillation")
#: What its sequences are. The rest may change when it goes on: rates, decay, steps, intervals.
STREAM_SETTINGS = ("data", "text_field", "position_offset", "batch_size", "seed")
#: What is read of Trainer's state.
_STATE = record({"global_step": whole(0, LARGEST_COUNT), "log_history": list_of(MAPPING)})
#: Files of a checkpoint that torch writes, as zip archives.
TORCH_FILES = ("optimizer.pt", "scheduler.pt")


def explicit(settings: TrainSettings) -> TrainSettings:
    """Return settings that mean the same wherever and by whatever release they are read again."""
    rounding = explicit_rounding(settings.rounding)
    return dataclasses.replace(
        settings,
        positional_parameters=settings.encoding_parameters.to_dict(),
        data=tuple(map(absolute_source, settings.data)),
        from_checkpoint=_absolute(settings.from_checkpoint),
        tokenizer=_absolute(settings.tokenizer),
        block_size=None if rounding is None else rounding.block_size,
    )


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


def require_same(settings: TrainSettings, run: Path, names: Sequence[str], setting: str) -> None:
    """Raise `ConfigError` where settings of those names are not as the run recorded them.

    setting: that asks to go on from the run.
    """
    for name, stored, asked in differences(settings, run, names):
        raise ConfigError(f"{name} is {asked}, but {stored} in the run of {run}; drop the option, or `{setting}`")


def differences(settings: TrainSettings, run: Path, names: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, recorded value and value of each setting of those names that is not as the run recorded it."""
    recorded = TrainSettings(**stored_settings(run))
    stored, asked = (json.loads(json.dumps(dataclasses.asdict(explicit(each)))) for each in (recorded, settings))
    yield from ((name, stored[name], asked[name]) for name in names if stored[name] != asked[name])


def require_same_stream(digest: str, run: Path) -> None:
    """Raise `ConfigError` where the run was trained on other tokens; runs of earlier releases did not record theirs.

    digest: `WindowDataset.digest` of the text as it is now.
    """
    written = json.loads((run / TRAINING_FILE).read_text(encoding="utf-8"))
    if written.get("stream", digest) != digest:
        raise ConfigError(
            f"the text of {run} has changed since its run began; bring it back, or start anew with `force`"
        )


def last_checkpoint(run: Path) -> tuple[Path, list[str]]:
    """Return the newest whole checkpoint of a run, and a line for each newer one that is not.

    Raises:
        CheckpointError: there is none.
    """
    damaged: list[str] = []
    for path in sorted((run / TRAINER_DIRECTORY).glob("checkpoint-*"), key=_step, reverse=True):
        faults = list(_faults(path))
        if not faults:
            return path, damaged
        damaged.append(f"{path}: {', '.join(faults)}; going on from the checkpoint before")
    reason = f" ({damaged[0].partition(': ')[2].partition(';')[0]})" if damaged else ""
    raise CheckpointError(f"{run}: no checkpoint to resume from{reason}; drop `resume`")


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1


def _faults(checkpoint: Path) -> Iterator[str]:
    """Yield what keeps a checkpoint from being resumed: files that are missing, empty or cut short."""
    try:
        values = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        _STATE("state", values)
        TrainerState(**values)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        yield "trainer_state.json is missing or damaged"
    try:
        with safe_open(checkpoint / "model.safetensors", "np"):
            pass
    except (OSError, SafetensorError):
        yield "model.safetensors is missing or damaged"
    random = [path.name for path in checkpoint.glob("rng_state*.pth")] or ["rng_state.pth"]
    for name in (*TORCH_FILES, *random):
        if not zipfile.is_zipfile(checkpoint / name):
            yield f"{name} is missing or damaged"
