"""Opening a checkpoint that `expe-edge train` wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from expe_edge.errors import CheckpointError, ConfigError, reason_of, shown
from expe_edge.model.config import ExPEConfig
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.package.checks import MAPPING, TEXT, list_of, optional, record, whole
from expe_edge.package.contract import LONGEST
from expe_edge.package.directory import is_package
from expe_edge.quant.recipe import WeightRounding
from expe_edge.text.corpus import Corpus, load_corpus
from expe_edge.text.tokenization import load_tokenizer
from expe_edge.training.settings import EIGHT_BIT_LEARNING_RATE, FINE_TUNING, TRAINING_FILE, WEIGHTS_FILE, upgraded

CONFIG_FILE = "config.json"
#: What is read of a training record, as far as anything depends on it; settings are checked where a run takes them.
_RECORD = record(
    {
        "settings": record(
            {"data": list_of(TEXT), "text_field": TEXT},
            sometimes={"quantization_aware": optional(TEXT), "block_size": optional(whole(1, LONGEST))},
        )
    },
    sometimes={"corpus": record({}, sometimes={"held_out": list_of(TEXT)})},
)


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with its tokenizer.

    sources: what `load_corpus` needs to find its training text again. rounding: what its weights were trained to be
    rounded to; None where they were not.
    """

    path: Path
    model: ExPEForCausalLM
    tokenizer: Tokenizer
    sources: dict[str, Any]
    rounding: WeightRounding | None = None

    @property
    def config(self) -> ExPEConfig:
        """The model's config."""
        config: ExPEConfig = self.model.config
        return config

    def corpus(self) -> Corpus:
        """Load the text the model was trained on, with its held-out part."""
        return load_corpus(**self.sources)


def load_checkpoint(path: Path) -> Checkpoint:
    """Load config, weights (safetensors alone, never a pickle), tokenizer and training record; no file beside them.

    Raises:
        CheckpointError: missing or truncated files, weights of other shapes, or a tokenizer of another vocabulary.
        ConfigError: a config with unknown keys or values.
    """
    values, written = _read_records(path)
    settings = written["settings"]
    try:
        sources = {"sources": settings["data"], "text_field": settings["text_field"]}
        if "held_out" in written.get("corpus", {}):  # earlier releases did not record it
            sources["held_out"] = written["corpus"]["held_out"]
        trained_for, block_size = settings.get("quantization_aware"), settings.get("block_size")
        rounding = None if trained_for is None else WeightRounding(trained_for, block_size)
    except ConfigError as error:
        raise CheckpointError(f"{path}: damaged {TRAINING_FILE} ({error})") from error
    if values.get("model_type") != ExPEConfig.model_type:
        raise CheckpointError(
            f"{path}: model_type is {shown(values.get('model_type'))}, not 'expe'; not made by expe-edge"
        )
    config = ExPEConfig.from_plain(values)
    model = _load_model(path, config)
    tokenizer = load_tokenizer(path, config.vocab_size)
    return Checkpoint(path, model.eval(), tokenizer, sources, rounding)


def starting_settings(path: Path, rounding: WeightRounding | None = None) -> dict[str, Any]:
    """Return the settings of a run that starts from the checkpoint `path`, for `make_settings`.

    Args:
        rounding: what the run is to train for; only the defaults depend on it.

    Raises:
        CheckpointError: missing or damaged files.
    """
    _, written = _read_records(path)
    settings = written["settings"]
    changed = {**FINE_TUNING, "from_checkpoint": str(path)}
    if rounding is not None and rounding.bits == 8:
        changed["learning_rate"] = EIGHT_BIT_LEARNING_RATE
    return {**settings, **changed}


def _read_records(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config's values and the training record of a finished checkpoint."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    if is_package(path):
        raise CheckpointError(f"{path} is a package, not a checkpoint; give the directory that train wrote")
    for name in (CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE):
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: no {name} in it, so not a finished checkpoint; run train, or `resume` it")
    try:
        values = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        written = json.loads((path / TRAINING_FILE).read_text(encoding="utf-8"))
        MAPPING(CONFIG_FILE, values)
        _RECORD(TRAINING_FILE, written)
        written["settings"] = upgraded(written["settings"])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged {CONFIG_FILE} or {TRAINING_FILE} ({error})") from error
    return values, written


def _load_model(path: Path, config: ExPEConfig) -> ExPEForCausalLM:
    """Return the model with its weights, whose names and shapes are compared before memory is taken for any."""
    tied = ExPEForCausalLM._tied_weights_keys if config.tie_word_embeddings else ()
    with torch.device("meta"):  # shapes without memory, and no weights drawn that the file's would replace
        model = ExPEForCausalLM(config)
    shapes = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    try:
        with safe_open(path / WEIGHTS_FILE, "pt") as file:
            stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # no mapping
            wrong = [name for name in {**shapes, **stored} if name not in tied and shapes.get(name) != stored.get(name)]
            if wrong:
                raise CheckpointError(
                    f"{path}: {WEIGHTS_FILE} does not fit {CONFIG_FILE} (first difference: {wrong[0]})"
                )
            weights = {name: file.get_tensor(name).to(torch.float32, copy=True) for name in stored}  # else a view of it
            model.load_state_dict(weights, strict=False, assign=True)
            model.tie_weights()
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: {WEIGHTS_FILE} is damaged or truncated ({reason_of(error)})") from error
    return model
