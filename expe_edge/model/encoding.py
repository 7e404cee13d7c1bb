"""The one interface through which the model knows positional encodings.

Notation: B batch · T query tokens · S keys · C hidden size · H heads · Hkv key/value heads · D head size ·
G limbs of a position's integer code.

An encoding may act at five places, each the identity unless overridden:

    embed    on the embeddings                     sinusoidal, ExPE at the embedding
    project  in the query/key/value product        ExPE, ExQPE
    temper   on the projected queries              ExPE, ExQPE
    rotate   on the projected queries and keys     rotary
    bias     on the scores                         ALiBi, ExPE, ExQPE (linear), relative (a table)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expe_edge.model.config import ExPEConfig
from expe_edge.positions.codes import PositionCode


class Projected(NamedTuple):
    """Queries, position-free keys and values, with the slopes that stand for the keys' positions.

    query: (B, H, T, D) · key, value: (B, Hkv, T, D) · slopes: (B, H, T, G) in units of the score before its
    division by √D, or None where keys carry their own position.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    slopes: Tensor | None


@dataclass(frozen=True)
class Heads:
    """How the rows of the fused weight divide: H·D of queries, then Hkv·D of keys, then Hkv·D of values."""

    queries: int
    keys: int
    size: int

    @property
    def query_rows(self) -> int:
        return self.queries * self.size

    @property
    def key_rows(self) -> int:
        return self.keys * self.size

    @property
    def rows(self) -> int:
        return self.query_rows + 2 * self.key_rows

    def split(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split (B, T, rows) into (B, H, T, D), (B, Hkv, T, D), (B, Hkv, T, D)."""
        parts = torch.split(fused, [self.query_rows, self.key_rows, self.key_rows], dim=-1)
        query, key, value = (torch.unflatten(part, -1, (-1, self.size)).transpose(1, 2) for part in parts)
        return query, key, value


class PositionalEncoding(nn.Module):
    """No encoding at all, and the interface of the others.

    `code` is the integer code of positions; `linear_bias` says whether the scores get a bias linear in it, `table_bias`
    whether they get one of `bias`.
    """

    code: PositionCode | None = None
    linear_bias = False
    table_bias = False
    #: Rounds the weight of the product as an export stores it, in quantization-aware training.
    quantizer: Callable[[Tensor], Tensor] | None = None

    def __init__(self, config: ExPEConfig) -> None:
        super().__init__()
        self.spec = config.encoding_parameters
        self.heads = Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim)

    def embed(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Return the embeddings (B, T, C) with what the encoding adds for `positions` (B, T) int64."""
        del positions
        return hidden

    def project(self, weight: Tensor, hidden: Tensor, positions: Tensor) -> Projected:
        """Apply the fused weight (C_out, C) to `hidden` (B, T, C)."""
        del positions
        return Projected(*self.heads.split(F.linear(hidden, self.stored(weight))), slopes=None)

    def stored(self, weight: Tensor) -> Tensor:
        """Return the weight that the product is taken with."""
        return weight if self.quantizer is None else self.quantizer(weight)

    def temper(self, query: Tensor, seen: Tensor) -> Tensor:
        """Return queries (B, H, T, D), of which each sees so many keys (B, T), sharpened or softened by that."""
        del seen
        return query

    def rotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """Return queries or keys (B, H, T, D) turned by their positions (B, T)."""
        del positions
        return states

    def bias(self, query_positions: Tensor, key_positions: Tensor) -> Tensor | None:
        """Return what is added to the scores, (B, H, T, S) float32, for positions (B, T) and (B, S)."""
        del query_positions, key_positions
        return None

    def begin(self, weight: Tensor) -> None:
        """Set what the encoding wants of a new layer's fused weight (C_out, C), random so far. Nothing, as a rule."""

    def limbs(self, positions: Tensor) -> Tensor:
        """Return the integer code of `positions` (…), as (…, G) int64."""
        assert self.code is not None
        return torch.stack(self.code.split(positions), dim=-1)
