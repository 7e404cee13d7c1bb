"""Attention in bfloat16, as it trains on a GPU: positions lose nothing in it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from expe_edge.model.attention import LIMB_UNITS, AttentionContext, exact_limbs
from tests.strategies import random_model, small_config

TOKENS, HEADS, SIZE = 700, 4, 8


class HalfContext(AttentionContext):
    """What training has on a GPU."""

    def _half(self) -> torch.dtype:
        return torch.bfloat16


def attended(positional: str, slopes: Tensor, value: Tensor, *, half: bool) -> Tensor:
    """Attention by slopes alone, (B, H, T, D): contents, whose rounding is what half precision costs, are zero."""
    model = random_model(small_config(positional=positional))
    kind = HalfContext if half else AttentionContext
    context = kind(model.positional, torch.arange(TOKENS)[None] + 1000, None, None)
    nothing = torch.zeros_like(value)
    if not half:
        return context.attend(nothing, nothing, value, slopes)
    return context.attend_in_half(nothing, nothing, value, slopes).float()


@pytest.mark.parametrize(("positional", "limbs"), [("expe", 1), ("alibi", 1), ("exqpe", 3)])
def test_slopes_over_many_keys_are_exact_in_bfloat16(positional: str, limbs: int) -> None:
    """Both the mixture and the gradient of the slopes; with positions rounded to bfloat16 both are off by a third."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, HEADS, TOKENS, SIZE, generator=generator).bfloat16().float()
    begin = torch.rand(1, HEADS, TOKENS, limbs, generator=generator) * math.sqrt(SIZE)
    mixtures, gradients = [], []
    for half in (False, True):
        slopes = begin.clone().requires_grad_()
        mixture = attended(positional, slopes, value, half=half)
        (mixture * value).sum().backward()  # type: ignore[no-untyped-call]
        assert slopes.grad is not None
        mixtures.append(mixture.detach())
        gradients.append(slopes.grad)
    for exact, half_precision in (mixtures, gradients):
        assert exact.norm() > 1
        assert (half_precision - exact).norm() < 0.02 * exact.norm()


def test_limbs_add_up_and_are_exact() -> None:
    codes = torch.tensor([0, 1, 255, 256, 511, 70_000, 2**24 - 1, -3])
    parts = [unit * limb.bfloat16().long() for unit, limb in zip(LIMB_UNITS, exact_limbs(codes), strict=True)]
    assert torch.equal(torch.stack(parts).sum(dim=0), codes)
