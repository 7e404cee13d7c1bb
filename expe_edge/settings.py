"""What a training run is asked to do: presets, a YAML file and flags, in rising order of precedence.

Imports neither torch nor transformers, so that the command line can show defaults and refuse a bad setting at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expe_edge.errors import ConfigError, unknown_name

DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides the outcome of `expe-edge train`. The defaults are the preset `tiny`.

    Attributes:
        data: sources of text (see `corpus.load_corpus`); empty for the standard library.
        vocab_size: size of the byte-level BPE; 257 is plain bytes.
        training_length: N, tokens per sequence.
        position_offset: every sequence starts at a random position, uniform in [0, position_offset·N); 0 is the
            paper's own form, all sequences at 0.
        positional_parameters: settings of the encoding, such as {"dims": 16, "step": 0.0078125}.
        batch_size: sequences per step over all processes.
        dtype: float32, bfloat16, or auto for bfloat16 where the machine computes in it.
        save_every, log_every: steps.
    """

    data: tuple[str, ...] = ()
    text_field: str = "text"
    vocab_size: int = 512
    training_length: int = 128
    position_offset: int = 64
    positional: str = "expe"
    positional_parameters: Mapping[str, Any] = field(default_factory=dict)
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    hidden_act: str = "swiglu"
    tie_word_embeddings: bool = False
    max_steps: int = 600
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0
    dtype: str = "auto"
    save_every: int = 500
    log_every: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", tuple(self.data))
        for name in ("max_steps", "batch_size", "learning_rate", "save_every", "log_every", "training_length"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0; change {_flag(name)}")
        for name in ("position_offset", "warmup_steps", "seed", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must not be negative; change {_flag(name)}")
        if self.dtype not in DTYPES:
            raise ConfigError(unknown_name("dtype", self.dtype, DTYPES) + "; change --dtype")


#: What differs from `tiny` in the other presets.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {
        "data": ("python-stdlib+tests",),
        "vocab_size": 4096,
        "training_length": 512,
        "hidden_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "max_steps": 5000,
        "learning_rate": 1e-3,
        "warmup_steps": 200,
    },
    "base": {
        "data": ("python-stdlib+tests",),
        "vocab_size": 16384,
        "training_length": 1024,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "max_steps": 20000,
        "batch_size": 64,
        "learning_rate": 6e-4,
        "warmup_steps": 500,
        "save_every": 1000,
    },
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def make_settings(
    preset: str = "tiny",
    config_file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    stored: Mapping[str, Any] | None = None,
) -> TrainSettings:
    """Merge the preset (or `stored` settings of a run to resume), the YAML file and the flags; the later wins.

    Raises:
        ConfigError: an unknown preset or key (the nearest is named), or a value out of range.
    """
    if preset not in PRESETS:
        raise ConfigError(unknown_name("preset", preset, PRESETS))
    merged = dict(PRESETS[preset] if stored is None else stored)
    merged |= read_yaml(config_file) if config_file else {}
    merged |= {name: value for name, value in (flags or {}).items() if value is not None and value != ()}
    known = [f.name for f in dataclasses.fields(TrainSettings)]
    for name in merged:
        if name not in known:
            raise ConfigError(unknown_name("config key", name, known))
    try:
        return TrainSettings(**merged)
    except TypeError as error:
        raise ConfigError(f"a setting has the wrong type: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a flat YAML mapping of settings."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: not readable as YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected a mapping of settings, got {type(values).__name__}")
    return values
