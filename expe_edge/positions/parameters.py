"""Which positional encodings there are, and the settings of each, validated when made.

One frozen dataclass per encoding, one registry. Imports neither torch nor transformers, so that the command line can
refuse a bad setting at once; `model/encodings.py` has the modules under the same names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expe_edge.errors import ConfigError, shown, unknown_name
from expe_edge.kinds import require_choice, require_positive
from expe_edge.positions.codes import FLOAT32_EXACT
from expe_edge.positions.encoding import EncodingParameters
from expe_edge.positions.expe import ExPEParameters, ExQPEParameters

#: Buckets of `relative`, each of which has a row of its table.
MOST_BUCKETS = 2**16


@dataclass(frozen=True)
class NoParameters(EncodingParameters):
    """Encodings without settings: `sinusoidal`, `alibi`, `none`."""


@dataclass(frozen=True)
class RotaryParameters(EncodingParameters):
    """Rotary embedding (Su et al., 2021). `theta` is the base of the geometric frequencies."""

    theta: float = 10000.0

    def validate(self, hidden_size: int, heads: int, head_dim: int, max_positions: int) -> None:
        require_positive(theta=self.theta)
        if head_dim % 2:
            raise ConfigError(f"rotary needs an even head_dim, got {head_dim}; change num_attention_heads")


@dataclass(frozen=True)
class RelativeParameters(EncodingParameters):
    """T5's relative position bias (Raffel et al., 2020): logarithmic buckets of the distance back."""

    buckets: int = 32
    max_distance: int = 128

    def validate(self, hidden_size: int, heads: int, head_dim: int, max_positions: int) -> None:
        if self.buckets < 2 or self.max_distance <= self.buckets // 2:
            raise ConfigError(
                f"relative: buckets={self.buckets}, max_distance={self.max_distance}; "
                "needs buckets >= 2 and max_distance > buckets / 2"
            )
        if self.max_distance > FLOAT32_EXACT or self.buckets > MOST_BUCKETS:
            raise ConfigError(
                f"relative: buckets={shown(self.buckets)}, max_distance={shown(self.max_distance)}; at most "
                f"{MOST_BUCKETS} and {FLOAT32_EXACT}"
            )


#: The registry of positional encodings: name to the type of its parameters. `model/encodings.py` has the modules.
POSITIONAL_PARAMETERS: dict[str, type[EncodingParameters]] = {
    "expe": ExPEParameters,
    "exqpe": ExQPEParameters,
    "rotary": RotaryParameters,
    "sinusoidal": NoParameters,
    "relative": RelativeParameters,
    "alibi": NoParameters,
    "none": NoParameters,
}


def encoding_parameters(
    name: str, values: Mapping[str, Any], training_length: int | None = None, heads: int | None = None
) -> EncodingParameters:
    """Make the parameters of encoding `name`, refusing unknown keys and naming the nearest known one.

    Args:
        training_length: N, for the settings left out that depend on it; None where `values` are complete.
        heads: of a new run, which has its `recipe` beside; None for a model as it is.
    """
    require_choice("positional encoding", name, tuple(POSITIONAL_PARAMETERS))
    kind = POSITIONAL_PARAMETERS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise ConfigError(unknown_name(f"parameter of positional encoding {name!r}", key, known))
    defaults = {}
    if training_length is not None:
        defaults = kind.defaults(values, training_length)
        if heads is not None:
            defaults |= kind.recipe(values, training_length, heads)
    return kind(**{**defaults, **values})
