"""What a model is: its architecture and its positional encoding, validated when made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from expe_edge.errors import ConfigError, unknown_name
from expe_edge.kinds import require_choice, require_kind, require_positive
from expe_edge.package.checks import Check, whole
from expe_edge.package.contract import BOUNDS, LONGEST, WIDEST
from expe_edge.positions.encoding import EncodingParameters
from expe_edge.positions.expe import ExPEParameters
from expe_edge.positions.parameters import encoding_parameters

ACTIVATIONS = ("swiglu", "gelu")
#: Head sizes that onnxruntime's attention operator takes are multiples of this; those of portable graphs may be any.
HEAD_SIZE_UNIT = 8
#: Bytes of weights that a graph holds at most: a message of protobuf ends at 2 GiB, and nodes take their share.
LARGEST_GRAPH = 2**31 - 2**24

#: Bounds of a model's sizes, those of the graphs that are made of it.
SIZES: dict[str, Check] = {
    "vocab_size": BOUNDS["vocab_size"],
    "hidden_size": whole(1, WIDEST),
    "num_hidden_layers": BOUNDS["layers"],
    "num_attention_heads": BOUNDS["key_value_heads"],
    "num_key_value_heads": BOUNDS["key_value_heads"],
    "head_dim": BOUNDS["head_size"],
    "intermediate_size": whole(1, WIDEST),
    "training_length": whole(1, LONGEST),
}

#: Keys that transformers itself writes into or passes through a config, beside the attributes of PretrainedConfig.
_TRANSFORMERS_KEYS = frozenset(PretrainedConfig().to_dict()) | {
    "_attn_implementation",
    "attn_implementation",
    "_commit_hash",
    "_name_or_path",
    "dtype",
    "experts_implementation",
    "name_or_path",
    "torch_dtype",
    "transformers_version",
}


class ExPEConfig(PretrainedConfig):  # type: ignore[misc]  # transformers publishes no types
    """Configuration of `ExPEForCausalLM`.

    Args:
        vocab_size: V. hidden_size: C. num_hidden_layers: number of blocks.
        num_attention_heads: H. num_key_value_heads: Hkv, divides H; None for H.
        intermediate_size: width of the feed-forward layer; None for 8/3 C (swiglu) or 4 C (gelu), in eights.
        hidden_act: `swiglu` or `gelu`.
        output_gate: whether what a head has read is multiplied by a gate, σ of a product with the attention's input.
        positional: a name in `POSITIONAL_PARAMETERS`. positional_parameters: its settings, plain data.
        training_length: N, tokens per training sequence.
        max_position_embeddings: positions that the encoding must represent exactly; None for all it can.

    Raises:
        ConfigError: an unknown key, a value of another kind, an unknown encoding, sizes out of `SIZES` or that do not
            divide, or inexact positions.
    """

    model_type = "expe"

    def __init__(
        self,
        vocab_size: int = 1024,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        intermediate_size: int | None = None,
        hidden_act: str = "swiglu",
        output_gate: bool = False,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        positional: str = "expe",
        positional_parameters: Mapping[str, Any] | None = None,
        training_length: int = 128,
        max_position_embeddings: int | None = None,
        bos_token_id: int | None = 0,
        eos_token_id: int | None = 0,
        pad_token_id: int | None = 0,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        given = dict(locals())
        for name in self._known_keys():
            require_kind(name, given[name], ExPEConfig.__init__.__annotations__[name])
        for key in kwargs:
            if key not in _TRANSFORMERS_KEYS:
                raise ConfigError(unknown_name("config key", key, self._known_keys()))
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.hidden_act = hidden_act
        self.output_gate = output_gate
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.positional = positional
        self.training_length = training_length
        self.use_cache = use_cache
        self._check_sizes(intermediate_size=intermediate_size, max_position_embeddings=max_position_embeddings)
        self.intermediate_size = intermediate_size or self._default_intermediate_size()
        self._check_bounds()
        parameters = encoding_parameters(positional, positional_parameters or {}, training_length)
        self.max_position_embeddings = max_position_embeddings or parameters.reach
        parameters.validate(hidden_size, num_attention_heads, self.head_dim, self.max_position_embeddings)
        if self.max_position_embeddings > parameters.reach:
            raise ConfigError(
                f"max_position_embeddings is {self.max_position_embeddings}, but positions are exact in float32 only "
                f"below {parameters.reach}; lower it"
            )
        self.positional_parameters = parameters.to_dict()
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> ExPEConfig:
        """Make the config of a `config.json` or a manifest; what transformers wrote beside ours is not looked at."""
        known = cls._known_keys()
        return cls(**{key: value for key, value in values.items() if key in known or key not in _TRANSFORMERS_KEYS})

    @classmethod
    def _known_keys(cls) -> list[str]:
        code = cls.__init__.__code__
        return list(code.co_varnames[1 : code.co_argcount])

    def _check_sizes(self, **optional: int | None) -> None:
        require_positive(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            training_length=self.training_length,
            num_key_value_heads=self.num_key_value_heads,
            **{name: value for name, value in optional.items() if value is not None},
        )
        require_choice("hidden_act", self.hidden_act, ACTIVATIONS)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    def _check_bounds(self) -> None:
        try:
            for name, check in SIZES.items():
                check(name, getattr(self, name))
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if self.rms_norm_eps < 0 or self.initializer_range < 0:
            raise ConfigError("rms_norm_eps and initializer_range must not be negative")

    def _default_intermediate_size(self) -> int:
        widest = self.hidden_size * 8 // 3 if self.hidden_act == "swiglu" else self.hidden_size * 4
        return -(-widest // 8) * 8

    def settings(self) -> dict[str, Any]:
        """Return the arguments that make this config, without what transformers adds."""
        return {name: getattr(self, name) for name in self._known_keys()}

    @property
    def head_dim(self) -> int:
        """D, the size of one head."""
        return int(self.hidden_size // self.num_attention_heads)

    @property
    def encoding_parameters(self) -> EncodingParameters:
        """The positional parameters as their frozen dataclass."""
        return encoding_parameters(self.positional, self.positional_parameters)

    @property
    def parameter_count(self) -> int:
        """Weights of the model, but for a table of its positions."""
        heads = (2 * self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        heads += self.num_attention_heads if self.output_gate else 0
        inner = self.intermediate_size * (3 if self.hidden_act == "swiglu" else 2)
        block = self.hidden_size * (heads + inner + 2)
        matrices = 1 if self.tie_word_embeddings else 2
        return int(self.hidden_size * (matrices * self.vocab_size + 1) + self.num_hidden_layers * block)

    @property
    def too_large(self) -> str | None:
        """Why no package can be made of this model; None where its float32 graph fits into one file."""
        size = 4 * self.parameter_count
        if size <= LARGEST_GRAPH:
            return None
        return (
            f"{self.parameter_count:,} parameters take {size / 1e9:.1f} GB in float32, and a graph with its weights is "
            f"one file of at most {LARGEST_GRAPH / 1e9:.1f} GB: no package can be made of this model; train one with a "
            "smaller `hidden_size`, `num_hidden_layers` or `vocab_size`"
        )

    @property
    def needs_portable(self) -> str | None:
        """Why only a portable graph can be made of this model; None where onnxruntime's attention takes its heads."""
        if self.head_dim % HEAD_SIZE_UNIT == 0:
            return None
        return (
            f"head size {self.head_dim} is not a multiple of {HEAD_SIZE_UNIT}, which onnxruntime's attention needs; "
            "export with `portable`, or train with another `num_attention_heads` or `hidden_size`"
        )

    @property
    def needs_folding(self) -> str | None:
        """Why positions cannot stay inside this model's products; None where they can."""
        parameters = self.encoding_parameters
        if not isinstance(parameters, ExPEParameters) or not parameters.shaped:
            return None
        return (
            "slopes that a softplus keeps above 0, and content_heads, are no product of positions with weights: export "
            "with `positions` folded, or train with softplus=false and content_heads=0"
        )

    @property
    def needs_inline(self) -> str | None:
        """Why positions cannot be folded out of this model's products; None where they can, or there are none."""
        parameters = self.encoding_parameters
        if parameters.code is None or parameters.foldable:
            return None
        return (
            "positions at the embedding pass through every norm and cannot be folded; export with `positions` inline, "
            "or train with another where"
        )
