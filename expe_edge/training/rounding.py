"""Quantization-aware training: the model computes with its weights rounded as an export would store them.

Fake quantization (Jacob et al., arXiv 1712.05877) with gradients passed straight through the rounding (Bengio et al.,
arXiv 1308.3432). What is trained, saved and resumed are the float weights; only what the products see is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.quant.blocks import BLOCK_SIZE, LARGEST_HALF, SMALLEST_HALF, midpoint
from expe_edge.quant.recipe import BLOCKWISE, WeightRounding

#: The rounding of an embedding that is not the head: 8 bits, one scale for each row.
EMBEDDING_BITS = 8


def round_to_nearest(weight: Tensor, bits: int, block_size: int | None) -> Tensor:
    """Return (rows, columns) float32 `weight` as stored with a scale for each block of a row, or for each row.

    Bit for bit what `quant.blocks.round_to_nearest` and, without blocks, `quant.channels.quantize_channels` restore to.
    """
    columns = weight.shape[1]
    block_size = block_size or columns
    blocks = torch.unflatten(F.pad(weight, (0, -columns % block_size)), 1, (-1, block_size))
    scale = storable(widest_scale(blocks, bits)).unsqueeze(-1)
    lowest, zero = 1 if bits == 8 else 0, midpoint(bits)
    codes = torch.clamp(torch.round(blocks / scale) + zero, lowest, 2 * zero - 1)
    return ((codes - zero) * scale).flatten(1)[:, :columns]


def widest_scale(blocks: Tensor, bits: int) -> Tensor:
    """Return the scale (…) that just covers `blocks` (…, block), as `quant.blocks.widest_scale`."""
    if bits == 8:
        largest = blocks.abs().amax(dim=-1)
        scale = largest / torch.full_like(largest, 127)  # not the number: CUDA would multiply by its reciprocal
    else:
        largest = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
        scale = -largest / midpoint(bits)  # a power of two, exact either way
    return torch.where(scale == 0, 1.0, scale)


def storable(scale: Tensor) -> Tensor:
    """Round scales up to half precision where all are normal there, as `quant.blocks.storable`."""
    size = scale.abs()
    half = size.half()
    above = (half.view(torch.int16) + 1).view(torch.float16)  # the next half; sizes are positive
    rounded = torch.where(half.float() < size, above, half).float().copysign(scale)
    return torch.where(((size >= SMALLEST_HALF) & (size <= LARGEST_HALF)).all(), rounded, scale)


class _StraightThrough(torch.autograd.Function):
    """Rounds forward; hands the gradient back unchanged."""

    @staticmethod
    def forward(_: Any, weight: Tensor, bits: int, block_size: int | None) -> Tensor:
        return round_to_nearest(weight, bits, block_size)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


@dataclass(frozen=True)
class FakeQuantizer:
    """Rounds a weight (rows, columns) for the forward pass; to the gradient it is the identity."""

    bits: int
    block_size: int | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        rounded: Tensor = _StraightThrough.apply(weight, self.bits, self.block_size)  # type: ignore[no-untyped-call]  # torch's
        return rounded


class RoundedLinear(nn.Linear):
    """A linear that shares its weight with another and computes with it rounded."""

    def __init__(self, linear: nn.Linear, quantizer: FakeQuantizer) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.quantizer = linear.weight, quantizer

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.quantizer(self.weight))


class RoundedEmbedding(nn.Embedding):
    """An embedding that shares its weight with another and looks up its rounded rows."""

    def __init__(self, embedding: nn.Embedding, quantizer: FakeQuantizer) -> None:
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, device="meta")
        self.weight, self.quantizer = embedding.weight, quantizer

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.quantizer(self.weight))


def round_weights(model: ExPEForCausalLM, rounding: WeightRounding) -> None:
    """Make `model` compute with its weights as an export would store them; parameters and their names stay.

    Of the fused query, key and value weights, what is rounded is the content that an export keeps in its integer
    product; positions and slopes stay exact there, and so here.
    """
    quantizer = FakeQuantizer(rounding.bits, rounding.block_size)
    model.positional.quantizer = quantizer
    for block in model.blocks:
        block.attention.out = RoundedLinear(block.attention.out, quantizer)
        block.feed_forward.up = RoundedLinear(block.feed_forward.up, quantizer)
        block.feed_forward.down = RoundedLinear(block.feed_forward.down, quantizer)
    model.head = RoundedLinear(model.head, quantizer)
    tied = model.config.tie_word_embeddings
    model.embedding = RoundedEmbedding(model.embedding, quantizer if tied else FakeQuantizer(EMBEDDING_BITS))


def explicit_rounding(rounding: WeightRounding | None) -> WeightRounding | None:
    """Return it with its block size, where it has blocks, given as a number."""
    if rounding is None or rounding.precision not in BLOCKWISE:
        return rounding
    return replace(rounding, block_size=rounding.block_size or BLOCK_SIZE[rounding.bits])


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher ‖ student), nats per token, of logits (B, T, V) (Hinton et al., arXiv 1503.02531)."""
    predicted, targets = (F.log_softmax(logits.float(), dim=-1).flatten(0, 1) for logits in (student, teacher))
    return F.kl_div(predicted, targets, reduction="batchmean", log_target=True)
