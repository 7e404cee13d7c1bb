"""Causal attention over position-free keys, and what all layers share in a forward pass.

Notation: B batch · T query tokens · S keys (cached and new) · C hidden size · H heads · Hkv key/value heads ·
D head size · V vocabulary · G limbs of a position's code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from expe_edge.model.config import ExPEConfig
from expe_edge.model.encoding import PositionalEncoding, Projected


class Attention(nn.Module):
    """Causal attention with grouped key/value heads; the cache holds keys as the encoding leaves them.

    Where there is a gate, each head's result is multiplied by a number of (0, 1) that the token chooses: a head with
    nothing to say falls silent, where it had to look at something (Qiu et al., arXiv 2505.06708, the gate of a head).
    """

    def __init__(self, config: ExPEConfig, layer: int, positional: PositionalEncoding) -> None:
        super().__init__()
        self.layer, self.heads = layer, positional.heads
        self.qkv = nn.Linear(config.hidden_size, self.heads.rows, bias=False)
        self.gate = nn.Linear(config.hidden_size, self.heads.queries, bias=False) if config.output_gate else None
        self.out = nn.Linear(self.heads.query_rows, config.hidden_size, bias=False)

    def project(self, hidden: Tensor, context: AttentionContext) -> Projected:
        """Return queries, keys, values and slopes of the normed `hidden` (B, T, C), as the encoding leaves them."""
        positional, positions = context.positional, context.query_positions
        query, key, value, slopes = positional.project(self.qkv.weight, hidden, positions)
        query = positional.rotate(positional.temper(query, context.seen), positions)
        return Projected(query, positional.rotate(key, positions), value, slopes)

    def forward(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        query, key, value, slopes = self.project(hidden, context)
        if context.cache is not None:
            key, value = context.cache.update(key, value, self.layer)
        # Scores are taken in float32 or wider whatever the autocast: positions must not pass through a half-precision
        # product. Where training takes them in bfloat16, on a GPU, positions go in as parts that are exact in it.
        wide = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            if context.half is None:
                states = context.attend(query.to(wide), key.to(wide), value.to(wide), slopes)
            else:
                states = context.attend_in_half(query.to(wide), key, value, slopes)
        states = states.transpose(1, 2)  # (B, T, H, D)
        if self.gate is not None:
            states = states * torch.sigmoid(self.gate(hidden)).to(states.dtype).unsqueeze(-1)
        written: Tensor = self.out(states.flatten(2).to(hidden.dtype))
        return written


#: Queries per block. Within a block, keys are counted from its first query, so that a slope is multiplied by small
#: numbers where precision matters; with 2048 queries in one block, float32 logits lose a digit and more.
QUERY_BLOCK = 256


class QueryBlock(NamedTuple):
    """Consecutive queries [begin, end), which see the first `keys` keys.

    mask: what is added to the scores, (B or 1, H or 1, end−begin, keys), or None for plain causal attention.
    codes: the keys' codes less that of the first query, (B, 1, keys, G), or None without a linear bias.
    """

    begin: int
    end: int
    keys: int
    mask: Tensor | None
    codes: Tensor | None


class AttentionContext:
    """What all layers share in one forward pass: positions, masks, biases and the cache."""

    def __init__(
        self,
        positional: PositionalEncoding,
        query_positions: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
    ) -> None:
        self.positional, self.query_positions, self.cache = positional, query_positions, cache
        self.past = cache.get_seq_length() if cache is not None else 0
        padded = attention_mask is not None and not bool(attention_mask.all())
        self.padding = attention_mask if padded else None
        self.half = self._half()
        self.key_positions = self._key_positions()  # (B, S)
        first = 0 if padded else self.key_positions[:, :1]  # padding may have any position; tokens count from 0 then
        self.seen = query_positions - first + 1  # keys that each query sees, (B, T)
        length = query_positions.shape[1]
        self.spans = [(begin, min(begin + QUERY_BLOCK, length)) for begin in range(0, length, QUERY_BLOCK)]
        self.blocks: dict[int, QueryBlock] = {}
        self.codes_in_half = self._codes_in_half() if self.half is not None and positional.linear_bias else None

    def _half(self) -> torch.dtype | None:
        """Return the half precision that scores are taken in: of whole texts under autocast on a GPU, else None."""
        device = self.query_positions.device.type
        if device != "cuda" or not torch.is_autocast_enabled(device):
            return None
        plain = self.cache is None and self.padding is None and not self.positional.table_bias
        return torch.get_autocast_dtype(device) if plain else None

    def _key_positions(self) -> Tensor:
        if self.past == 0:
            return self.query_positions
        if self.padding is not None:
            return mask_positions(self.padding)
        total = self.past + self.query_positions.shape[1]
        return torch.arange(total, device=self.query_positions.device).expand(len(self.query_positions), -1)

    def block(self, begin: int, end: int) -> QueryBlock:
        """Return one block of the queries.

        All blocks together grow with the square of the length. Where gradients are taken they are kept, as the backward
        pass needs them anyway; else only the last, and the others are made again for every layer.
        """
        if begin not in self.blocks:
            if not torch.is_grad_enabled():
                self.blocks.clear()
            self.blocks[begin] = self._block(begin, end)
        return self.blocks[begin]

    def _block(self, begin: int, end: int) -> QueryBlock:
        keys, codes = self.past + end, None
        queries = self.query_positions[:, begin:end]
        if self.positional.linear_bias:
            reference = self.positional.limbs(queries[:, :1])
            codes = (self.positional.limbs(self.key_positions[:, :keys]) - reference).unsqueeze(1)
        bias = self.positional.bias(queries, self.key_positions[:, :keys])
        return QueryBlock(begin, end, keys, self._mask(begin, end, bias), codes)

    def _mask(self, begin: int, end: int, bias: Tensor | None) -> Tensor | None:
        first = self.past + begin
        if bias is None and self.padding is None and (first == 0 or end - begin == 1):
            return None
        device = self.query_positions.device
        rows = torch.arange(first, self.past + end, device=device)[:, None]
        visible = torch.arange(self.past + end, device=device) <= rows  # (T, S)
        if self.padding is not None:
            visible = visible & self.padding[:, None, None, : self.past + end].bool()
        blocked = torch.zeros(visible.shape, device=device).masked_fill(~visible, torch.finfo(torch.float32).min)
        return blocked if bias is None else blocked + bias

    def attend(self, query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None) -> Tensor:
        """Softmax attention over (B, H, T, D) and (B, Hkv, S, D) with the linear bias of `slopes` (B, H, T, G).

        A bias linear in the key's code is a few more dimensions of the inner product, so that no (T, S) tensor is
        made: q·κ_j + Σ_g slope_g·code_g(j) = [q ; slope]·[κ_j ; code(j)].
        """
        groups, size = query.shape[1] // key.shape[1], query.shape[-1]
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        query = self._scaled(query, slopes)
        if slopes is not None:
            value = F.pad(value, (0, query.shape[-1] - size))  # the fused kernels want one head size
        mixed = [self._attend_block(self.block(*span), query, key, value) for span in self.spans]
        return torch.cat(mixed, dim=2)[..., :size]

    def weights(
        self, query: Tensor, key: Tensor, slopes: Tensor | None, first: int = 0
    ) -> Iterator[tuple[QueryBlock, Tensor]]:
        """Yield the blocks that hold queries from `first` on, with the weights (B, H, t, keys) that `attend` mixes by.

        Arguments as of `attend`. One block's weights at a time: those of a long text would not fit into memory.
        """
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        query = self._scaled(query, slopes)
        for begin, end in self.spans:
            if end > first:
                block = self.block(begin, end)
                ours, theirs, mask = self._factors(block, query, key)
                scores = ours @ theirs.transpose(-1, -2)
                if mask is None:
                    future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(block.keys - (end - begin) + 1)
                    scores = scores.masked_fill(future, -torch.inf)
                yield block, (scores if mask is None else scores + mask).softmax(dim=-1)

    @staticmethod
    def _scaled(query: Tensor, slopes: Tensor | None) -> Tensor:
        """Return queries divided by √D, with their slopes as further dimensions."""
        states = query if slopes is None else aligned(torch.cat([query, slopes], dim=-1))
        return states / math.sqrt(query.shape[-1])

    @staticmethod
    def _factors(block: QueryBlock, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return a block's queries and keys, whose inner products are its scores, and what is added to these."""
        query, key = query[:, :, block.begin : block.end], key[:, :, : block.keys]
        if block.codes is not None:
            key = aligned(torch.cat([key, block.codes.to(key.dtype).expand(*key.shape[:3], -1)], dim=-1))
        return query, key, None if block.mask is None else block.mask.to(query.dtype)

    def _attend_block(self, block: QueryBlock, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, mask = self._factors(block, query, key)
        value = value[:, :, : block.keys]
        causal = mask is None and query.shape[2] > 1
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=1.0)

    def attend_in_half(self, query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None) -> Tensor:
        """Do as `attend` in the precision of `half`, all queries in one fused kernel, which sums in float32."""
        assert self.half is not None
        groups, size = query.shape[1] // key.shape[1], query.shape[-1]
        key, value = (states.to(self.half).repeat_interleave(groups, dim=1) for states in (key, value))
        query = (query / math.sqrt(size)).to(self.half)
        if slopes is not None:
            ours, theirs = self._bias_in_half(slopes / math.sqrt(size), self.half)
            query, key = torch.cat([query, ours], dim=-1), torch.cat([key, theirs.expand(*key.shape[:3], -1)], dim=-1)
            value = F.pad(value, (0, ours.shape[-1]))
        query, key, value = aligned(query), aligned(key), aligned(value)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)[..., :size]

    def _bias_in_half(self, slopes: Tensor, half: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what a bias of `slopes` (B, H, T, G) adds to the dimensions of queries and of keys.

        Σ_g slope_g·(code_g(j) − code_g(i)), of which code(j) is cut into limbs that the type holds exactly, and slope
        the sum of two of its numbers, the second alone with a gradient: it is off by the square of the type's unit
        roundoff, 2^-18 of itself in bfloat16. What −code(i) adds to all scores of a query changes no attention, and may
        be rounded. The gradient needs it: in half precision the gradients of a query's scores do not quite add up to 0,
        and what is left would be multiplied by the position, where it should be by the distance.
        """
        assert self.codes_in_half is not None
        codes, keys = self.codes_in_half
        scaled = torch.cat([slopes * unit for unit in LIMB_UNITS], dim=-1)
        coarse = scaled.detach().to(half)
        own = -(slopes * codes).sum(dim=-1, keepdim=True).to(half)
        return torch.cat([coarse, (scaled - coarse).to(half), own], dim=-1), keys

    def _codes_in_half(self) -> tuple[Tensor, Tensor]:
        """The codes of all keys, (B, 1, T, G), and the dimensions that keys get of them, the same in every layer."""
        codes = self.block(0, self.query_positions.shape[1]).codes
        assert codes is not None
        assert self.half is not None
        limbs = torch.cat(exact_limbs(codes), dim=-1).to(self.half)
        return codes, torch.cat([limbs, limbs, torch.ones_like(limbs[..., :1])], dim=-1)


#: What a unit of each of `exact_limbs` is worth.
LIMB_UNITS = (1, 2**8, 2**16)


def exact_limbs(codes: Tensor) -> list[Tensor]:
    """Cut integer codes (…) within ± 2^24 into multiples of `LIMB_UNITS`, which bfloat16 holds exactly.

    All have the sign of the code: large ones that cancel each other would lose their gradients.
    """
    size, sign = codes.abs(), codes.sign()
    return [sign * (size & 255), sign * (size >> 8 & 255), sign * (size >> 16)]


def aligned(states: Tensor) -> Tensor:
    """Return (…, D) with zeros up to a multiple of 16 bytes on a GPU, whose fused kernels take no other head size."""
    return F.pad(states, (0, -states.shape[-1] % (16 // states.element_size()))) if states.is_cuda else states


def mask_positions(attention_mask: Tensor) -> Tensor:
    """Return the positions (B, S) of the tokens of a mask (B, S), padding not counted."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
