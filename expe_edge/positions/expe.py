"""The settings of ExPE and ExQPE, validated when made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expe_edge.errors import ConfigError, shown
from expe_edge.kinds import all_are, is_number, require_choice, require_positive
from expe_edge.positions.codes import FLOAT32_EXACT, INT8_LIMIT, WHOLE, PositionCode, require_exact
from expe_edge.positions.encoding import EncodingParameters

#: Where ExPE puts the position vector. `query_key` is the paper's choice; `key`, the keys' input alone, is ours.
WHERE = ("key", "query_key", "query_key_value", "embedding")
#: How: `override` replaces the first dimensions, as in the paper; `add` adds to them.
HOW = ("override", "add")
#: How the slopes of the heads begin: as ALiBi's, at zero, or as the random weights give them.
SLOPES = ("alibi", "zero", "random")
#: Settings of the relative form that came after slopes, as configs and records that say nothing of them mean them.
LATER = {"softplus": False, "content_heads": 0, "temperature": 0.0}
#: How steep a head's softplus is, in units of the slope that it begins with.
SHARPNESS = 4.0
#: The largest temperature.
HOTTEST = 16.0


def per_dimension(name: str, value: float | Sequence[float], dims: int) -> tuple[float, ...]:
    """Spread a scalar over `dims` dimensions, or check that a sequence has one value for each."""
    values = (float(value),) * dims if isinstance(value, int | float) else tuple(map(float, value))
    if len(values) != dims:
        raise ConfigError(f"{name} has {len(values)} values; give one number, or one for each of the {dims} dims")
    return values


@dataclass(frozen=True)
class ExPEParameters(EncodingParameters):
    """ExPE (arXiv 2509.19569): p_n = start + step·n in the first `dims` dimensions of a projection's input.

    Attributes:
        dims: l, the number of overridden dimensions.
        start, step: one number, or one for each dimension; where dimensions are `halved`, one number for the half that
            it fills. A model of N training positions has `defaults` of its own.
        where: one of `WHERE`. With `key` the queries' input gets `start` alone, so that attention is exactly relative.
        how: one of `HOW`.
        slopes: how training begins, one of `SLOPES` or a slope for each head, in nats per position of distance.
        softplus: keep slopes above 0, by a softplus of each that leaves it as it is where it begins.
        content_heads: so many heads of every layer, the last, have slope 0 and keep it: they see content alone.
        temperature: c; a query that sees n keys has the scores of its content heads multiplied by 1 + c·ln(n/N).

    The last three are of the relative form, and this project's; docs/design.md has their sources.
    """

    dims: int = 16
    start: float | tuple[float, ...] = 0.0
    step: float | tuple[float, ...] = 0.0078125
    where: str = "key"
    how: str = "override"
    slopes: str | tuple[float, ...] = "random"
    softplus: bool = False
    content_heads: int = 0
    temperature: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(dims=self.dims)
        require_choice("where", self.where, WHERE)
        require_choice("how", self.how, HOW)
        if isinstance(self.slopes, str):
            require_choice("slopes", self.slopes, SLOPES)
        elif not all_are(is_number, self.slopes):
            raise ConfigError(
                f"slopes is {shown(self.slopes)}; give {', '.join(SLOPES)}, or a list of one number a head"
            )
        if self.slopes != "random" and self.where not in ("key", "query_key"):
            raise ConfigError(f"slopes is {self.slopes!r}, which needs where: key or query_key, not {self.where}")
        for name in LATER:
            if getattr(self, name) and not self.relative:
                raise ConfigError(f"{name} is {getattr(self, name)}, which needs where: key, not {self.where}")
        if self.softplus and (self.code.limbs > 1 or self.slopes in ("zero", "random")):
            raise ConfigError("softplus needs slopes that begin above 0, of one limb; set softplus=false")
        if not 0 <= self.temperature <= HOTTEST:
            raise ConfigError(f"temperature is {shown(self.temperature)}; allowed: 0 to {HOTTEST}")
        if self.temperature and not self.content_heads:
            raise ConfigError(f"temperature is {self.temperature}, but there are no content_heads; set temperature=0")

    @classmethod
    def defaults(cls, given: Mapping[str, Any], training_length: int) -> dict[str, Any]:
        """Let the positions of training span 1, the step a power of two; longer spans are learnt later, or not at all.

        In the relative form the constant part is 1, and slopes begin as ALiBi's. All that is this project's choice:
        docs/log.md has its measurements.
        """
        relative = given.get("where", cls.where) == "key"
        slopes = given.get("slopes", "alibi" if relative else "random")
        start = 1.0 if relative or slopes != "random" else 0.0
        return {"start": start, "step": cls.unit_step(training_length), "slopes": slopes}

    @classmethod
    def unit_step(cls, training_length: int) -> float:
        """What one position adds to a dimension that counts, where no step is given."""
        return float(2.0 ** -(training_length - 1).bit_length())

    @classmethod
    def recipe(cls, given: Mapping[str, Any], training_length: int, heads: int) -> dict[str, Any]:
        defaults = {**cls.defaults(given, training_length), **given}
        if defaults.get("where", cls.where) != "key":
            return {}
        content_heads = given.get("content_heads", heads // 3 if isinstance(defaults["slopes"], str) else 0)
        temperature = 1 / math.log(training_length) if content_heads and training_length > 1 else 0.0
        return {"softplus": defaults["slopes"] == "alibi", "content_heads": content_heads, "temperature": temperature}

    def to_dict(self) -> dict[str, Any]:
        """Leave out what older configs do not have where it is not in use, so that those stay as they are."""
        values = dataclasses.asdict(self)
        if not self.halved:
            del values["slopes"]
        return {name: value for name, value in values.items() if name not in LATER or value}

    @property
    def code(self) -> PositionCode:
        """The position itself."""
        return WHOLE

    @property
    def position_dims(self) -> int:
        return self.dims

    @property
    def foldable(self) -> bool:
        return self.where != "embedding"

    @property
    def relative(self) -> bool:
        """Whether queries carry no position, so that attention depends on distances alone."""
        return self.where == "key"

    @property
    def halved(self) -> bool:
        """Whether half of each limb's dimensions are constant and the other half count, so that slopes can be set."""
        return self.relative or self.slopes != "random"

    @property
    def shaped(self) -> bool:
        """Whether slopes are more than products of queries with keys, so that no override computes them."""
        return self.softplus or self.content_heads > 0

    @property
    def starts(self) -> tuple[float, ...]:
        """`start` for each dimension."""
        return self._spread("start", self.start, half=0)

    @property
    def steps(self) -> tuple[float, ...]:
        """What one unit of its limb adds to each dimension."""
        return self._spread("step", self.step, half=1)

    def _spread(self, name: str, value: float | tuple[float, ...], half: int) -> tuple[float, ...]:
        values = per_dimension(name, value, self.dims)
        if not self.halved or isinstance(value, tuple):
            return values
        group = self.dims // self.code.limbs
        return tuple(v if 2 * (dim % group) // group == half else 0.0 for dim, v in enumerate(values))

    @property
    def limb_steps(self) -> tuple[tuple[float, ...], ...]:
        """What one unit of each limb adds to each dimension: (limbs, dims)."""
        return (self.steps,)

    def head_slopes(self, heads: int) -> tuple[float, ...] | None:
        """The slope that each head begins with, in nats per position; None where they are random."""
        if self.slopes == "random":
            return None
        if self.slopes == "alibi":
            return (*alibi_slopes(heads - self.content_heads), *(0.0,) * self.content_heads)
        return (0.0,) * heads if self.slopes == "zero" else tuple(map(float, self.slopes))

    def content(self, heads: int) -> tuple[bool, ...]:
        """Which heads see content alone."""
        return tuple(head >= heads - self.content_heads for head in range(heads))

    def sharpness(self, heads: int) -> tuple[float, ...] | None:
        """Return κ of each head's softplus, ln(1 + e^{κ·s})/κ of a slope s in nats; None where slopes keep their sign.

        Where a head begins, the softplus adds 1/220 to its slope. That of content heads has no meaning.
        """
        slopes = self.head_slopes(heads)
        if not self.softplus or slopes is None:
            return None
        return tuple(1.0 if content else SHARPNESS / s for s, content in zip(slopes, self.content(heads), strict=True))

    def validate(self, hidden_size: int, heads: int, head_dim: int, max_positions: int) -> None:
        if self.dims > hidden_size:
            raise ConfigError(f"dims is {self.dims}, above hidden_size {hidden_size}; lower dims")
        if self.halved and self.dims < 2 * self.code.limbs:
            raise ConfigError(
                f"dims is {self.dims}, but half of each limb's dims are constant: raise dims to {2 * self.code.limbs}"
            )
        if not 0 <= self.content_heads < heads:
            raise ConfigError(
                f"content_heads is {self.content_heads}; allowed: 0 to {heads - 1}, one less than num_attention_heads"
            )
        slopes = self.head_slopes(heads)
        if slopes is not None:
            self._validate_slopes(slopes, heads)
        self._require_exact(max_positions)

    def _validate_slopes(self, slopes: tuple[float, ...], heads: int) -> None:
        if len(slopes) != heads:
            raise ConfigError(
                f"slopes is {self.slopes}; give {', '.join(SLOPES)}, or a number for each of {heads} heads"
            )
        for slope, content in zip(slopes, self.content(heads), strict=True):
            if content and slope:
                raise ConfigError(f"slopes is {self.slopes}; give 0 for the last {self.content_heads}, content_heads")
            if self.softplus and not content and slope <= 0:
                raise ConfigError(f"slopes is {self.slopes}; softplus needs them above 0; set softplus=false")
        if any(slopes) and self.readings() is None:
            raise ConfigError(
                f"slopes is {self.slopes!r}, but start={self.start} and step={self.step} cannot be told apart; give "
                "one number for each, neither of them 0, or slopes=random"
            )

    def readings(self) -> tuple[tuple[float, ...], ...] | None:
        """Return what to multiply p_n by to read one part of it alone, (1 + limbs, dims).

        The product of p_n with the first row is 1 at every position, with each other the value of its limb; they are
        the least such rows. None where start is a combination of the steps, so that the two cannot be told apart.
        """
        import numpy as np

        parts = np.array([self.starts, *self.limb_steps])
        if np.linalg.matrix_rank(parts) < len(parts):
            return None
        return tuple(map(tuple, np.linalg.pinv(parts).T.tolist()))

    def _require_exact(self, max_positions: int) -> None:
        require_exact(self.starts, self.limb_steps[0], max_positions)


def alibi_slopes(heads: int) -> list[float]:
    """Return the slope of each head as in ALiBi's code: a geometric sequence, interleaved off powers of two."""
    closest = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / closest) for h in range(closest)]
    return slopes + [2.0 ** (-4.0 * (2 * h + 1) / closest) for h in range(heads - closest)]


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
    def unit_step(cls, training_length: int) -> float:
        """The same for every length, as are the spans of the limbs."""
        del training_length
        return 0.125

    @classmethod
    def recipe(cls, given: Mapping[str, Any], training_length: int, heads: int) -> dict[str, Any]:
        """As of ExPE, but for the softplus, which no sum of limbs' slopes has."""
        found = super().recipe(given, training_length, heads)
        return {**found, "softplus": False} if found else {}

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(limbs=self.limbs, limb_bits=self.limb_bits)
        if self.dims % self.limbs:
            raise ConfigError(f"dims is {self.dims}, which {self.limbs} limbs do not divide; change dims or limbs")
        if not self.code.int8_reach:
            raise ConfigError(f"limb_bits is {self.limb_bits}; limbs must stay below 128, so allowed: 1 to 7")

    @property
    def code(self) -> PositionCode:
        return PositionCode(self.limb_bits, self.limbs)

    @property
    def reach(self) -> int:
        """Positions below this have every limb exact in int8."""
        return min(self.code.int8_reach, FLOAT32_EXACT)

    @property
    def limb_steps(self) -> tuple[tuple[float, ...], ...]:
        steps, group = self.steps, self.dims // self.limbs
        return tuple(
            tuple(step if dim // group == limb else 0.0 for dim, step in enumerate(steps)) for limb in range(self.limbs)
        )

    def _require_exact(self, max_positions: int) -> None:
        if max_positions > self.reach:
            raise ConfigError(
                f"max_position_embeddings is {max_positions}, but {self.limbs} limbs of {self.limb_bits} bits are "
                f"exact in int8 only below {self.reach}; add limbs or lower max_position_embeddings"
            )
        for steps in self.limb_steps:
            require_exact(self.starts, steps, INT8_LIMIT, positions=False)
