"""Integer codes of positions, and the exactness of positions in float32.

A position is an integer n, so it has an exact integer code: its digits in base 2^bits, low limb first. The last
limb is not wrapped, so that it keeps growing linearly and extrapolation stays linear. One limb is n itself, which
is what ExPE uses; several limbs are ExQPE. (The paper's own text on ExQPE is not public: this definition is ours.)

Imports nothing heavy: settings, models, graphs and manifests share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from expe_edge.errors import ConfigError

#: Integers up to here, and no further, are all exact in float32 (24 bits of significand).
FLOAT32_EXACT = 2**24
#: Smallest positive float32: finer values do not exist.
SMALLEST_FLOAT32 = Fraction(1, 2**149)
#: Values a limb may take and stay exact in int8; bfloat16, with its 8 bits of significand, holds them too.
INT8_LIMIT = 128


@dataclass(frozen=True)
class PositionCode:
    """The digits of a position in base 2^bits.

    Attributes:
        bits: width of a wrapped limb, 1 to 24.
        limbs: how many limbs, at least 1. Limb g < limbs-1 is (n >> g·bits) mod 2^bits; the last is n >> g·bits.
    """

    bits: int
    limbs: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 24:
            raise ConfigError(f"limb_bits is {self.bits}; allowed: 1 to 24")
        if not 1 <= self.limbs <= 24:
            raise ConfigError(f"limbs is {self.limbs}; allowed: 1 to 24")
        if self.bits * (self.limbs - 1) > 24:
            raise ConfigError(
                f"{self.limbs} limbs of {self.bits} bits exceed the 24 bits of a position; use fewer limbs"
            )

    @property
    def weights(self) -> tuple[int, ...]:
        """What one unit of each limb is worth in positions: 1, 2^bits, 2^(2·bits), …"""
        return tuple(1 << (self.bits * g) for g in range(self.limbs))

    @property
    def stored(self) -> PositionCode:
        """The code in which an exported graph holds the same positions: bytes for a whole number, else itself."""
        return STORAGE if self.limbs == 1 else self

    @property
    def int8_reach(self) -> int:
        """Positions below this have every limb in [0, 128), exact in int8 and in bfloat16."""
        widest_wrapped = 1 << self.bits if self.limbs > 1 else 1
        if widest_wrapped > INT8_LIMIT:
            return 0
        return INT8_LIMIT << (self.bits * (self.limbs - 1))

    def split(self, positions: Any) -> list[Any]:
        """Return the limbs, low limb first, of an int or of an integer array or tensor of any library."""
        mask = (1 << self.bits) - 1
        wrapped = [(positions >> (self.bits * g)) & mask for g in range(self.limbs - 1)]
        return [*wrapped, positions >> (self.bits * (self.limbs - 1))]

    def join(self, limbs: Sequence[Any]) -> Any:
        """Return the positions of `limbs`; the inverse of `split`."""
        return sum(limb * weight for limb, weight in zip(limbs, self.weights, strict=True))


#: The position itself: one unwrapped limb.
WHOLE = PositionCode(bits=24, limbs=1)
#: How exported graphs hold a whole number: three bytes reach every n < 2^24.
STORAGE = PositionCode(bits=8, limbs=3)


def _power_of_two_part(value: Fraction) -> int:
    """Return e for the largest 2^e that divides `value` (nonzero, with a power-of-two denominator)."""
    low_bit = value.numerator & -value.numerator
    return low_bit.bit_length() - value.denominator.bit_length()


def is_exact(start: float, step: float, count: int) -> bool:
    """Tell whether start + step·n is exact in float32 for every n in [0, count).

    All values are integer multiples of one power of two; they are exact while the largest of them, counted in
    that unit, needs at most 24 bits.
    """
    terms = [Fraction(value) for value in (start, step) if value != 0]
    if not terms:
        return True
    unit = Fraction(2) ** min(_power_of_two_part(term) for term in terms)
    if unit < SMALLEST_FLOAT32:
        return False
    last = Fraction(start) + Fraction(step) * (count - 1)
    return max(abs(Fraction(start)), abs(last)) / unit <= FLOAT32_EXACT


def exact_below(start: float, step: float, count: int) -> int:
    """Return the largest number of n, up to `count`, that `is_exact` for this start and step."""
    few, many = 0, count + 1  # exact for few, not for many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if is_exact(start, step, middle) else (few, middle)
    return few


def require_exact(start: Sequence[float], step: Sequence[float], count: int, *, positions: bool = True) -> None:
    """Raise `ConfigError` unless every dimension's values are exact for n in [0, count).

    positions: whether n are positions, of which fewer may do; else they are the values of a limb.
    """
    for dim, (a, b) in enumerate(zip(start, step, strict=True)):
        if not is_exact(a, b, count):
            reach = exact_below(a, b, count)
            fewer = f"lower max_position_embeddings to {reach}, or " if positions and reach > 1 else ""
            exact = "a step that is a power of two, such as 0.0078125, and start=0" if b else "a start such as 1 or 0.5"
            raise ConfigError(
                f"positions start + step·n with start={a!r}, step={b!r} (dimension {dim}) are not exact in float32 "
                f"for every n < {count}; {fewer}use {exact}"
            )
