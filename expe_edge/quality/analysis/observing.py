"""What passes through a model while it reads a text: the residual stream, and what attention takes and makes of it.

Notation: T tokens · C hidden size · H heads · D head size · G limbs of a position's code. Layers count from 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from expe_edge.model.attention import Attention, AttentionContext
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.model.encoding import Projected
from expe_edge.quality.scoring import Ids


@dataclass(frozen=True)
class AttentionView:
    """What one layer's attention works with. normed: the normed residual stream that enters it, (T, C)."""

    normed: Tensor
    projected: Projected
    context: AttentionContext

    @property
    def slopes(self) -> Tensor | None:
        """The bias per token of distance by each limb, (H, T, G) in nats; None where keys carry their positions.

        A limb's unit is worth several positions; its slope is divided by them. Above zero, far keys get less.
        """
        slopes, code = self.projected.slopes, self.context.positional.code
        if slopes is None or code is None:
            return None
        return slopes[0] / (math.sqrt(self.projected.query.shape[-1]) * slopes.new_tensor(code.weights))

    def weights(self, first: int) -> Iterator[tuple[int, Tensor]]:
        """Yield attention weights (H, t, S) of one block of queries after another, with the place of its first query.

        Every query from `first` on is among them, none before. Keys are the S first of the text.
        """
        query, key, _, slopes = self.projected
        for block, weights in self.context.weights(query, key, slopes, first):
            begin = max(first, block.begin)
            yield begin, weights[0, :, begin - block.begin :]


class Observer(Protocol):
    """Takes in what passes while a model reads a text."""

    def residual(self, layer: int, hidden: Tensor) -> None:
        """Take the residual stream (T, C) behind `layer`; 0 is the embeddings'."""

    def attention(self, layer: int, view: AttentionView) -> None:
        """Take what the attention of `layer` works with."""


def observe(model: ExPEForCausalLM, tokens: Ids, observer: Observer) -> None:
    """Let `model` read `tokens` (T,) whole, without a cache, and show `observer` every layer in turn."""

    def before_block(layer: int) -> Any:
        return lambda _, inputs: observer.residual(layer - 1, inputs[0][0])

    def before_attention(layer: int) -> Any:
        def see(attention: Attention, inputs: tuple[Tensor, AttentionContext]) -> None:
            hidden, context = inputs
            observer.attention(layer, AttentionView(hidden[0], attention.project(hidden, context), context))

        return see

    with ExitStack() as hooks, torch.inference_mode():
        for layer, block in enumerate(model.blocks, 1):
            hooks.enter_context(block.register_forward_pre_hook(before_block(layer)))
            hooks.enter_context(block.attention.register_forward_pre_hook(before_attention(layer)))
        last = len(model.blocks)
        hooks.enter_context(
            model.blocks[-1].register_forward_hook(lambda _, __, output: observer.residual(last, output[0]))
        )
        model.hidden_states(torch.from_numpy(tokens)[None].to(model.device))
