"""The one interface through which settings of positional encodings are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expe_edge.kinds import require_kinds
from expe_edge.positions.codes import FLOAT32_EXACT, PositionCode


@dataclass(frozen=True)
class EncodingParameters:
    """The settings of one encoding, checked when made."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))
        require_kinds(self)

    @classmethod
    def defaults(cls, given: Mapping[str, Any], training_length: int) -> dict[str, Any]:
        """Return the settings whose defaults depend on those `given` or on the training length."""
        del given, training_length
        return {}

    @classmethod
    def recipe(cls, given: Mapping[str, Any], training_length: int, heads: int) -> dict[str, Any]:
        """Return the settings that a new run has beside `defaults` and those `given`: the best that was measured."""
        del given, training_length, heads
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, from which `encoding_parameters` makes the same again."""
        return dataclasses.asdict(self)

    @property
    def reach(self) -> int:
        """The largest number of positions that the encoding represents exactly."""
        return FLOAT32_EXACT

    @property
    def code(self) -> PositionCode | None:
        """The integer code that the encoding is linear in; None for others."""
        return None

    @property
    def position_dims(self) -> int:
        """l, how many of the first dimensions of some input hold positions; 0 for encodings that leave them alone."""
        return 0

    @property
    def foldable(self) -> bool:
        """Whether positions enter the products' inputs, from where they can be folded out."""
        return False

    def validate(self, hidden_size: int, heads: int, head_dim: int, max_positions: int) -> None:
        """Raise `ConfigError` where the settings do not fit the model. Nothing to check here."""
