"""Plain data for JSON, of what is measured."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """Figures, and what holds figures, as frozen dataclasses."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; null for numbers that are not finite."""
        values: dict[str, Any] = finite(dataclasses.asdict(self))
        return values


def finite(value: Any) -> Any:
    """Return plain data with None for numbers that are not finite, and lists for tuples."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
