"""Opening a checkpoint that `expe-edge train` wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from tokenizers import Tokenizer

from expe_edge.config import ExPEConfig
from expe_edge.corpus import Corpus, load_corpus
from expe_edge.errors import CheckpointError
from expe_edge.modeling import ExPEForCausalLM
from expe_edge.package import is_package
from expe_edge.tokenization import load_tokenizer
from expe_edge.training import TRAINING_FILE

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with its tokenizer, and what `load_corpus` needs to find its training text again."""

    path: Path
    model: ExPEForCausalLM
    tokenizer: Tokenizer
    sources: dict[str, Any]

    @property
    def config(self) -> ExPEConfig:
        """The model's config."""
        config: ExPEConfig = self.model.config
        return config

    def corpus(self) -> Corpus:
        """Load the text the model was trained on, with its held-out part."""
        return load_corpus(**self.sources)


def load_checkpoint(path: Path) -> Checkpoint:
    """Load config, weights (safetensors alone, never a pickle), tokenizer and training record.

    Raises:
        CheckpointError: missing or truncated files, weights of other shapes, or a tokenizer of another vocabulary.
        ConfigError: a config with unknown keys or values.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    if is_package(path):
        raise CheckpointError(f"{path} is a package, not a checkpoint; give the directory that train wrote")
    for name in (CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE):
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: no {name} in it, so not a finished checkpoint; run train, or --resume it")
    try:
        values = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError(f"{CONFIG_FILE} is no mapping")
        settings = json.loads((path / TRAINING_FILE).read_text(encoding="utf-8"))["settings"]
        sources = {"sources": list(settings["data"]), "text_field": settings["text_field"]}
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged {CONFIG_FILE} or {TRAINING_FILE} ({error})") from error
    if values.get("model_type") != ExPEConfig.model_type:
        raise CheckpointError(f"{path}: model_type is {values.get('model_type')!r}, not 'expe'; not made by expe-edge")
    config = ExPEConfig.from_dict(values)
    model = _load_model(path, config)
    tokenizer = load_tokenizer(path)
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the model's vocabulary "
            f"{config.vocab_size}; they do not belong together"
        )
    return Checkpoint(path, model.eval(), tokenizer, sources)


def _load_model(path: Path, config: ExPEConfig) -> ExPEForCausalLM:
    try:
        model, report = ExPEForCausalLM.from_pretrained(
            path, config=config, use_safetensors=True, output_loading_info=True, local_files_only=True
        )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: {WEIGHTS_FILE} is damaged or truncated ({reason})") from error
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise CheckpointError(f"{path}: {WEIGHTS_FILE} does not fit {CONFIG_FILE} (first difference: {wrong[0]})")
    return cast(ExPEForCausalLM, model)
