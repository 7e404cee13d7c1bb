"""The formats of one package by name: of its linears, its embedding and its cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FLOAT32 = "float32"
#: What is measured weight by weight goes by these names beside those of the linears.
EMBEDDING, CACHE = "embedding", "cache"


@dataclass(frozen=True)
class Formats:
    """Names of formats.

    linears: of each linear; float32 where it is missing. embedding: of one that is not the head as well. cache: of the
    key/value cache.
    """

    linears: Mapping[str, str] = field(default_factory=dict)
    embedding: str = FLOAT32
    cache: str = FLOAT32

    @classmethod
    def by_weight(cls, formats: Mapping[str, str], cache: str = FLOAT32) -> Formats:
        """Return the formats of weights that include the embedding, as `EMBEDDING`, and the cache, as `CACHE`."""
        linears = {name: chosen for name, chosen in formats.items() if name not in (EMBEDDING, CACHE)}
        return cls(linears, formats.get(EMBEDDING, FLOAT32), formats.get(CACHE, cache))
