"""Positional encodings by name and the parameters of each, validated when made.

One frozen dataclass per encoding, one registry. Imports neither torch nor transformers, so that the command line can
refuse a bad setting at once; `positional.py` has the modules under the same names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from expe_edge.errors import ConfigError, unknown_name
from expe_edge.quant.codes import FLOAT32_EXACT, INT8_LIMIT, WHOLE, PositionCode, require_exact

#: Where ExPE puts the position vector. `query_key` is the paper's choice.
WHERE = ("query_key", "query_key_value", "embedding")
#: How: `override` replaces the first dimensions, as in the paper; `add` adds to them.
HOW = ("override", "add")


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
    values = (float(value),) * dims if isinstance(value, int | float) else tuple(map(float, value))
    if len(values) != dims:
        raise ConfigError(f"{name} has {len(values)} values; give one number, or one for each of the {dims} dims")
    if not all(map(math.isfinite, values)):
        raise ConfigError(f"{name} is {value}; it must be finite")
    return values


@dataclass(frozen=True)
class NoParameters:
    """Encodings without settings: `sinusoidal`, `alibi`, `none`."""

    #: The largest number of positions the encoding can represent exactly.
    reach: ClassVar[int] = FLOAT32_EXACT

    @classmethod
    def defaults(cls, training_length: int) -> dict[str, Any]:
        """Return the settings whose defaults depend on the training length."""
        del training_length
        return {}

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
        start, step: one number, or one for each dimension. A model of N training positions has `defaults` of its own.
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

    @classmethod
    def defaults(cls, training_length: int) -> dict[str, Any]:
        """Let the positions of training span 1, the step a power of two; longer spans are learnt later, or not at all.

        That is this project's choice: docs/log.md has its measurement.
        """
        return {"step": 2.0 ** -(training_length - 1).bit_length()}

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

    @classmethod
    def defaults(cls, training_length: int) -> dict[str, Any]:
        """Leave the step alone: the limbs span the same at every length."""
        del training_length
        return {}

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


def encoding_parameters(name: str, values: Mapping[str, Any], training_length: int | None = None) -> NoParameters:
    """Make the parameters of encoding `name`, refusing unknown keys and naming the nearest known one.

    Args:
        training_length: N, for the settings left out that depend on it; None where `values` are complete.
    """
    require_choice("positional encoding", name, tuple(POSITIONAL_PARAMETERS))
    kind = POSITIONAL_PARAMETERS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise ConfigError(unknown_name(f"parameter of positional encoding {name!r}", key, known))
    defaults = {} if training_length is None else kind.defaults(training_length)
    return kind(**{**defaults, **values})
