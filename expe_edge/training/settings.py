"""What a training run is asked to do: presets, a YAML file and flags, in rising order of precedence.

Imports neither torch nor transformers, so that the command line can show defaults and refuse a bad setting at once.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expe_edge.errors import CheckpointError, ConfigError, reason_of, unknown_name
from expe_edge.kinds import require_kinds
from expe_edge.positions.encoding import EncodingParameters
from expe_edge.positions.expe import LATER
from expe_edge.positions.parameters import POSITIONAL_PARAMETERS, encoding_parameters
from expe_edge.quant.recipe import WEIGHT_BITS, WeightRounding

DTYPES = ("auto", "float32", "bfloat16")
#: Settings, corpus and loss history of a run, beside the model.
TRAINING_FILE = "training.json"
#: The weights of a finished run; one without them is not finished.
WEIGHTS_FILE = "model.safetensors"
#: Where Trainer keeps what resuming needs.
TRAINER_DIRECTORY = "trainer"

#: Settings that must be above 0 where they are given, and those that must not be below.
POSITIVE = (
    *("max_steps", "batch_size", "learning_rate", "save_every", "log_every", "training_length", "vocab_size"),
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "max_position_embeddings"),
)
NOT_NEGATIVE = ("position_offset", "warmup_steps", "seed", "weight_decay", "max_grad_norm")
#: What a run counts. The product of two is still a number that everything counts with; sizes have bounds of a model's.
COUNTS = ("max_steps", "batch_size", "save_every", "log_every", "position_offset", "warmup_steps")
LARGEST_COUNT = 2**31 - 1
#: The largest that NumPy's generator takes, as transformers seeds it.
LARGEST_SEED = 2**32 - 1
#: A number that YAML 1.1 takes for text: an exponent without a sign or a point.
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
#: What differs from the settings of the checkpoint that a fine-tuning run starts from.
FINE_TUNING: dict[str, Any] = {
    "max_steps": 100,
    "learning_rate": 1e-4,
    "warmup_steps": 10,
    "quantization_aware": None,
    "block_size": None,
    "tokenizer": None,
}
#: The learning rate of fine-tuning for 8 bits, a level of which is a sixteenth of one of 4.
EIGHT_BIT_LEARNING_RATE = 1e-5


def _setting(default: Any, help_text: str, **option: Any) -> Any:
    """A field with its default and the sentence that `expe-edge train --help` shows.

    option: `kind`, the type of its values, where the default is None.
    """
    make = {"default_factory": dict} if default == {} else {"default": default}
    return field(**make, metadata={"help": help_text, **option})


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides the outcome of `expe-edge train`. The defaults are the preset `tiny`."""

    data: tuple[str, ...] = _setting((), "Text: file, folder, glob, .jsonl, .json, .parquet or dataset; repeatable.")
    text_field: str = _setting("text", "Field that holds the text in rows and datasets.")
    vocab_size: int = _setting(512, "Size of the byte-level BPE vocabulary; 257 is plain bytes.")
    tokenizer: str | None = _setting(
        None, "Use the tokenizer of this checkpoint or package, of whatever size, in place of a new one.", kind=str
    )
    training_length: int = _setting(128, "N, tokens per training sequence.")
    position_offset: int = _setting(0, "Start every sequence at a random position below this many N.")
    positional: str = _setting("expe", f"Positional encoding: {', '.join(POSITIONAL_PARAMETERS)}.")
    positional_parameters: Mapping[str, Any] = _setting({}, "Parameter of the encoding, KEY=VALUE; repeatable.")
    max_position_embeddings: int | None = _setting(
        None, "Positions that must be exact; by default all that the encoding can count.", kind=int
    )
    hidden_size: int = _setting(128, "C, width of the model.")
    num_hidden_layers: int = _setting(4, "Number of blocks.")
    num_attention_heads: int = _setting(4, "Attention heads.")
    num_key_value_heads: int | None = _setting(
        None, "Key/value heads; by default as many as attention heads.", kind=int
    )
    intermediate_size: int | None = _setting(
        None, "Width of the feed-forward layer; by default 8/3 C for swiglu, 4 C for gelu.", kind=int
    )
    hidden_act: str = _setting("swiglu", "Feed-forward activation: swiglu or gelu.")
    output_gate: bool = _setting(True, "Multiply what every head has read by a gate of its own.")
    tie_word_embeddings: bool = _setting(False, "Use the embedding as the head.")
    max_steps: int = _setting(400, "Optimizer steps.")
    batch_size: int = _setting(32, "Sequences per step, over all processes.")
    learning_rate: float = _setting(3e-3, "Peak learning rate; cosine decay to 0.")
    warmup_steps: int = _setting(50, "Steps of linear warm-up.")
    weight_decay: float = _setting(0.1, "AdamW's weight decay.")
    max_grad_norm: float = _setting(1.0, "Gradients are clipped to this norm.")
    seed: int = _setting(0, "Seed of initialization and data order.")
    dtype: str = _setting("auto", "float32, bfloat16, or auto: bfloat16 where the machine computes in it.")
    compile: bool = _setting(False, "Compile the model first: minutes on a CPU, but twice the speed on a GPU.")
    save_every: int = _setting(200, "Steps between checkpoints.")
    log_every: int = _setting(10, "Steps between loss reports.")
    from_checkpoint: str | None = _setting(
        None,
        "Fine-tune this checkpoint, by its own settings but for "
        + ", ".join(f"{name} {value}" for name, value in FINE_TUNING.items() if value is not None)
        + f" (learning_rate {EIGHT_BIT_LEARNING_RATE} for 8 bits).",
        kind=str,
    )
    quantization_aware: str | None = _setting(
        None, f"Fine-tune for an export with weights of this precision: {', '.join(WEIGHT_BITS)}.", kind=str
    )
    block_size: int | None = _setting(None, "Columns that share a scale, for int*-weight; as in export.", kind=int)
    distillation: bool = _setting(True, "Quantization-aware: match what the checkpoint predicts, not the text.")

    def __post_init__(self) -> None:
        data = (self.data,) if isinstance(self.data, str) else self.data
        object.__setattr__(self, "data", tuple(data) if isinstance(data, list) else data)
        require_kinds(self, "; change `{name}`")
        for name in POSITIVE:
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0; change `{name}`")
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must not be negative; change `{name}`")
        for name in COUNTS:
            if getattr(self, name) > LARGEST_COUNT:
                raise ConfigError(f"{name} is {getattr(self, name)}; at most {LARGEST_COUNT}; change `{name}`")
        if self.seed > LARGEST_SEED:
            raise ConfigError(f"seed is {self.seed}; at most {LARGEST_SEED}; change `seed`")
        if self.dtype not in DTYPES:
            raise ConfigError(unknown_name("dtype", self.dtype, DTYPES) + "; change `dtype`")
        _ = self.encoding_parameters  # made here so that what it refuses is refused
        if self.tokenizer is not None and self.from_checkpoint is not None:
            raise ConfigError("`tokenizer` has no meaning with `from_checkpoint`, which has one; drop it")
        rounding = self.rounding
        if rounding is not None and self.from_checkpoint is None:
            raise ConfigError(
                f"`quantization_aware` {rounding.precision} fine-tunes a checkpoint; name it by `from_checkpoint`"
            )
        if rounding is None and self.block_size is not None:
            raise ConfigError(f"block_size is {self.block_size}, but nothing is rounded; give `quantization_aware` too")

    @property
    def encoding_parameters(self) -> EncodingParameters:
        """The encoding's settings, those included that are not given."""
        return encoding_parameters(
            self.positional, self.positional_parameters, self.training_length, self.num_attention_heads
        )

    @property
    def rounding(self) -> WeightRounding | None:
        """What weights are rounded to in training; None where they are not."""
        return WeightRounding(self.quantization_aware, self.block_size) if self.quantization_aware is not None else None


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
        "max_steps": 2000,
        "batch_size": 16,
        "learning_rate": 1.5e-3,
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
        "learning_rate": 3e-4,
        "warmup_steps": 500,
        "save_every": 1000,
    },
}


def make_settings(
    preset: str = "tiny",
    config_file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    stored: Mapping[str, Any] | None = None,
) -> TrainSettings:
    """Merge the preset (or `stored` settings, of a run to resume or to start from), the YAML file and the flags.

    The later wins.

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
    return TrainSettings(**merged)


def read_yaml(path: Path, what: str = "`config_file`") -> dict[str, Any]:
    """Read a YAML mapping of settings: keys are text and stand once; 1e-3 is a number, as in YAML 1.2.

    what: the file, in messages.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for place, key in enumerate(keys):
                line = node.value[place][0].start_mark.line + 1
                if not isinstance(key, str):
                    raise ConfigError(f"{what} {path}: line {line}: the key {key!r} is no text; write it in quotes")
                if key in keys[:place]:
                    raise ConfigError(f"{what} {path}: line {line}: {key} stands there twice; keep one")
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader) or {}  # noqa: S506  # a safe loader
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError(f"{what} {path}: nested too deeply") from error
    except Exception as error:  # of a value that its tag does not allow PyYAML raises whatever Python does
        raise ConfigError(f"{what} {path}: not readable as YAML ({reason_of(error)})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{what} {path}: expected a mapping of settings, got {type(values).__name__}")
    return values


def upgraded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a recorded run as this release means them.

    Runs of ExPE that do not record where positions enter were made when that was the queries' and the keys' input.
    Those that record no gate, or nothing of what came after slopes, had none of it.
    """
    settings = {"output_gate": False, **settings}
    parameters = settings.get("positional_parameters")
    if settings.get("positional") not in ("expe", "exqpe") or not isinstance(parameters, Mapping):
        return settings
    return {**settings, "positional_parameters": {"where": "query_key", **LATER, **parameters}}


def stored_settings(out: Path) -> dict[str, Any]:
    """Read the settings of the run in `out`, for resuming it."""
    path = out / TRAINING_FILE
    try:
        settings = upgraded(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{out}: no run to resume (no readable {TRAINING_FILE}); drop `resume`") from error
    return settings
