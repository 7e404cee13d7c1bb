"""What a model is: architecture and positional encoding, validated when made.

`ExPEConfig` is a transformers config; the parameters of the encoding are one frozen dataclass per encoding, kept in
`positional_parameters` as plain data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PretrainedConfig

from expe_edge.errors import ConfigError, unknown_name
from expe_edge.quant.codes import FLOAT32_EXACT, INT8_LIMIT, WHOLE, PositionCode, require_exact

#: Where ExPE puts the position vector. `query_key` is the paper's choice.
WHERE = ("query_key", "query_key_value", "embedding")
#: How: `override` replaces the first dimensions, as in the paper; `add` adds to them.
HOW = ("override", "add")
ACTIVATIONS = ("swiglu", "gelu")


def require_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise `ConfigError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(unknown_name(name, value, allowed))


def require_positive(**values: float) -> None:
    """Raise `ConfigError` unless every value is above zero."""
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(f"{name} is {value}; it must be above 0")


def per_dimension(name: str, value: float | Sequence[float], dims: int) -> tuple[float, ...]:
    """Spread a scalar over `dims` dimensions, or check that a sequence has one value for each."""
    if isinstance(value, int | float):
        return (float(value),) * dims
    if len(value) != dims:
        raise ConfigError(f"{name} has {len(value)} values; give one number, or one for each of the {dims} dims")
    return tuple(float(v) for v in value)


@dataclass(frozen=True)
class NoParameters:
    """Encodings without settings: `sinusoidal`, `alibi`, `none`."""

    #: The largest number of positions the encoding can represent exactly.
    reach: ClassVar[int] = FLOAT32_EXACT

    def validate(self, hidden_size: int, head_dim: int, max_positions: int) -> None:
        """Raise `ConfigError` where the settings do not fit the model. Nothing to check here."""


@dataclass(frozen=True)
class RotaryParameters(NoParameters):
    """Rotary embedding (Su et al., 2021). `theta` is the base of the geometric frequencies."""

    theta: float = 10000.0

    def validate(self, hidden_size: int, head_dim: int, max_positions: int) -> None:
        require_positive(theta=self.theta)
        if head_dim % 2:
            raise ConfigError(f"rotary needs an even head_dim, got {head_dim}; change num_attention_heads")


@dataclass(frozen=True)
class RelativeParameters(NoParameters):
    """T5's relative position bias (Raffel et al., 2020): logarithmic buckets of the distance back."""

    buckets: int = 32
    max_distance: int = 128

    def validate(self, hidden_size: int, head_dim: int, max_positions: int) -> None:
        if self.buckets < 2 or self.max_distance <= self.buckets // 2:
            raise ConfigError(
                f"relative: buckets={self.buckets}, max_distance={self.max_distance}; "
                "needs buckets >= 2 and max_distance > buckets / 2"
            )


@dataclass(frozen=True)
class ExPEParameters(NoParameters):
    """ExPE (arXiv 2509.19569): p_n = start + step·n in the first `dims` dimensions of a projection's input.

    Attributes:
        dims: l, the number of overridden dimensions.
        start, step: one number, or one for each dimension.
        where: one of `WHERE`. how: one of `HOW`.
    """

    dims: int = 16
    start: float | tuple[float, ...] = 0.0
    step: float | tuple[float, ...] = 0.0078125
    where: str = "query_key"
    how: str = "override"

    def __post_init__(self) -> None:
        require_positive(dims=self.dims)
        require_choice("where", self.where, WHERE)
        require_choice("how", self.how, HOW)
        for name in ("start", "step"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

    @property
    def code(self) -> PositionCode:
        """The integer code that the encoding is linear in: the position itself."""
        return WHOLE

    @property
    def starts(self) -> tuple[float, ...]:
        """`start` for each dimension."""
        return per_dimension("start", self.start, self.dims)

    @property
    def limb_steps(self) -> tuple[tuple[float, ...], ...]:
        """What one unit of each limb adds to each dimension: (limbs, dims)."""
        return (per_dimension("step", self.step, self.dims),)

    def validate(self, hidden_size: int, head_dim: int, max_positions: int) -> None:
        if self.dims > hidden_size:
            raise ConfigError(f"dims is {self.dims}, above hidden_size {hidden_size}; lower dims")
        require_exact(self.starts, self.limb_steps[0], max_positions)


@dataclass(frozen=True)
class ExQPEParameters(ExPEParameters):
    """ExQPE as this project defines it: the position's limbs, each in its own group of the `dims` dimensions.

    `step` is the value of one unit of a limb; it is a power of two so that every limb value, an integer below 128,
    is exact in int8 and bfloat16 up to that scale. The reach is the positions for which that holds.
    """

    dims: int = 24
    step: float | tuple[float, ...] = 0.125
    limb_bits: int = 4
    limbs: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dims % self.limbs:
            raise ConfigError(f"dims is {self.dims}, which {self.limbs} limbs do not divide; change dims or limbs")
        if not self.code.int8_reach:
            raise ConfigError(f"limb_bits is {self.limb_bits}; limbs must stay below 128, so allowed: 1 to 7")

    @property
    def code(self) -> PositionCode:
        return PositionCode(self.limb_bits, self.limbs)

    @property
    def reach(self) -> int:  # type: ignore[override]  # a property of the limbs, where other encodings have a constant
        """Positions below this have every limb exact in int8."""
        return min(self.code.int8_reach, FLOAT32_EXACT)

    @property
    def limb_steps(self) -> tuple[tuple[float, ...], ...]:
        steps = per_dimension("step", self.step, self.dims)
        group = self.dims // self.limbs
        return tuple(
            tuple(step if dim // group == limb else 0.0 for dim, step in enumerate(steps)) for limb in range(self.limbs)
        )

    def validate(self, hidden_size: int, head_dim: int, max_positions: int) -> None:
        if self.dims > hidden_size:
            raise ConfigError(f"dims is {self.dims}, above hidden_size {hidden_size}; lower dims")
        if max_positions > self.reach:
            raise ConfigError(
                f"max_position_embeddings is {max_positions}, but {self.limbs} limbs of {self.limb_bits} bits are "
                f"exact in int8 only below {self.reach}; add limbs or lower max_position_embeddings"
            )
        for steps in self.limb_steps:
            require_exact(self.starts, steps, INT8_LIMIT)


#: The registry of positional encodings: name to the type of its parameters. `positional.py` has the modules.
POSITIONAL_PARAMETERS: dict[str, type[NoParameters]] = {
    "expe": ExPEParameters,
    "exqpe": ExQPEParameters,
    "rotary": RotaryParameters,
    "sinusoidal": NoParameters,
    "relative": RelativeParameters,
    "alibi": NoParameters,
    "none": NoParameters,
}


def encoding_parameters(name: str, values: Mapping[str, Any]) -> NoParameters:
    """Make the parameters of encoding `name`, refusing unknown keys and naming the nearest known one."""
    require_choice("positional encoding", name, tuple(POSITIONAL_PARAMETERS))
    kind = POSITIONAL_PARAMETERS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise ConfigError(unknown_name(f"parameter of positional encoding {name!r}", key, known))
    return kind(**values)


#: Keys that transformers itself writes into or passes through a config, beside the attributes of PretrainedConfig.
_TRANSFORMERS_KEYS = frozenset(PretrainedConfig().to_dict()) | {
    "_attn_implementation",
    "attn_implementation",
    "_commit_hash",
    "_name_or_path",
    "dtype",
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
        positional: a name in `POSITIONAL_PARAMETERS`. positional_parameters: its settings, plain data.
        training_length: N, tokens per training sequence.
        max_position_embeddings: positions that the encoding must represent exactly; None for all it can.

    Raises:
        ConfigError: an unknown key, an unknown encoding, sizes that do not divide, or inexact positions.
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
        for key in kwargs:
            if key not in _TRANSFORMERS_KEYS:
                raise ConfigError(unknown_name("config key", key, self._known_keys()))
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.positional = positional
        self.training_length = training_length
        self.use_cache = use_cache
        self._check_sizes()
        self.intermediate_size = intermediate_size or self._default_intermediate_size()
        parameters = encoding_parameters(positional, positional_parameters or {})
        self.max_position_embeddings = max_position_embeddings or parameters.reach
        parameters.validate(hidden_size, self.head_dim, self.max_position_embeddings)
        self.positional_parameters = dataclasses.asdict(parameters)
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )

    @classmethod
    def _known_keys(cls) -> list[str]:
        code = cls.__init__.__code__
        return list(code.co_varnames[1 : code.co_argcount])

    def _check_sizes(self) -> None:
        require_positive(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            training_length=self.training_length,
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

    def _default_intermediate_size(self) -> int:
        widest = self.hidden_size * 8 // 3 if self.hidden_act == "swiglu" else self.hidden_size * 4
        return -(-widest // 8) * 8

    @property
    def head_dim(self) -> int:
        """D, the size of one head."""
        return int(self.hidden_size // self.num_attention_heads)

    @property
    def encoding_parameters(self) -> NoParameters:
        """The positional parameters as their frozen dataclass."""
        return encoding_parameters(self.positional, self.positional_parameters)
