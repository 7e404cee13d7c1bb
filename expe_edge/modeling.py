"""The model: a small pre-norm decoder with RMSNorm and any positional encoding of the registry.

Notation: B batch · T query tokens · S keys (cached and new) · C hidden size · H heads · Hkv key/value heads ·
D head size · V vocabulary · G limbs of a position's code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from expe_edge.config import ExPEConfig
from expe_edge.positional import PositionalEncoding, make_encoding


class Attention(nn.Module):
    """Causal attention with grouped key/value heads; the cache holds keys as the encoding leaves them."""

    def __init__(self, config: ExPEConfig, layer: int, positional: PositionalEncoding) -> None:
        super().__init__()
        self.layer, self.heads = layer, positional.heads
        self.qkv = nn.Linear(config.hidden_size, self.heads.rows, bias=False)
        self.out = nn.Linear(self.heads.query_rows, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        positional = context.positional
        query, key, value, slopes = positional.project(self.qkv.weight, hidden, context.query_positions)
        query = positional.rotate(query, context.query_positions)
        key = positional.rotate(key, context.query_positions)
        if context.cache is not None:
            key, value = context.cache.update(key, value, self.layer)
        # Scores are taken in float32 whatever the autocast: positions must not pass through a half-precision product.
        with torch.autocast(hidden.device.type, enabled=False):
            states = context.attend(query.float(), key.float(), value.float(), slopes)
        return self.out(states.transpose(1, 2).flatten(2).to(hidden.dtype))


class AttentionContext:
    """What all layers share in one forward pass: positions, mask, bias and cache."""

    def __init__(
        self,
        positional: PositionalEncoding,
        query_positions: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
    ) -> None:
        self.positional, self.query_positions, self.cache = positional, query_positions, cache
        past = cache.get_seq_length() if cache is not None else 0
        length = query_positions.shape[1]
        self.key_positions = self._key_positions(attention_mask, past)  # (B, S)
        self.codes = self._relative_codes()
        bias = positional.bias(query_positions, self.key_positions)
        self.mask = self._mask(attention_mask, past, length, bias)

    def _key_positions(self, attention_mask: Tensor | None, past: int) -> Tensor:
        if past == 0:
            return self.query_positions
        if attention_mask is not None:
            return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        total = past + self.query_positions.shape[1]
        return torch.arange(total, device=self.query_positions.device).expand(len(self.query_positions), -1)

    def _relative_codes(self) -> Tensor | None:
        """Codes of the keys less those of the first query, (B, 1, S, G): near zero where precision matters."""
        if self.positional.code is None:
            return None
        reference = self.positional.limbs(self.query_positions[:, :1])
        return (self.positional.limbs(self.key_positions) - reference).unsqueeze(1).float()

    def _mask(self, attention_mask: Tensor | None, past: int, length: int, bias: Tensor | None) -> Tensor | None:
        """Return the additive float mask (B or 1, H or 1, T, S), or None where plain causal attention is meant."""
        padded = attention_mask is not None and not bool(attention_mask.all())
        if bias is None and not padded and (past == 0 or length == 1):
            return None
        device = self.query_positions.device
        query_index = torch.arange(past, past + length, device=device)
        visible = torch.arange(past + length, device=device) <= query_index[:, None]  # (T, S)
        if padded:
            assert attention_mask is not None
            visible = visible & attention_mask[:, None, None, :].bool()
        blocked = torch.zeros(visible.shape, device=device).masked_fill(~visible, torch.finfo(torch.float32).min)
        return blocked if bias is None else blocked + bias

    def attend(self, query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None) -> Tensor:
        """Softmax attention over (B, H, T, D) and (B, Hkv, S, D), float32, with the linear bias of `slopes`.

        A bias linear in the key's code is a few more dimensions of the inner product, so that no (T, S) tensor is
        made: q·κ_j + Σ_g slope_g·code_g(j) = [q ; slope]·[κ_j ; code(j)].
        """
        groups, size = query.shape[1] // key.shape[1], query.shape[-1]
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        query = query / math.sqrt(size)
        if slopes is not None:
            assert self.codes is not None
            query = torch.cat([query, slopes / math.sqrt(size)], dim=-1)
            key = torch.cat([key, self.codes.expand(*key.shape[:3], -1)], dim=-1)
            value = F.pad(value, (0, slopes.shape[-1]))  # the fused kernels want one head size
        causal = self.mask is None and query.shape[2] > 1
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask, is_causal=causal, scale=1.0)
        return mixed[..., :size]


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020) with gate and up in one product, or GELU."""

    def __init__(self, config: ExPEConfig) -> None:
        super().__init__()
        self.gated = config.hidden_act == "swiglu"
        width = config.intermediate_size * (2 if self.gated else 1)
        self.up = nn.Linear(config.hidden_size, width, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.up(hidden)
        if not self.gated:
            return self.down(F.gelu(hidden))
        gate, up = hidden.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: ExPEConfig, layer: int, positional: PositionalEncoding) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config, layer, positional)
        self.feed_forward_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), context)
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))


class ExPEForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers publishes no types
    """Decoder-only language model; `generate`, `save_pretrained` and `from_pretrained` are transformers' own."""

    config_class = ExPEConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ("Block",)
    _tied_weights_keys = ("head.weight",)

    def __init__(self, config: ExPEConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positional = make_encoding(config)
        self.blocks = nn.ModuleList(
            Block(config, layer, self.positional) for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights; those that write to the residual stream scaled down by its depth (GPT-2)."""
        deviation = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(std=deviation)
        elif isinstance(module, nn.RMSNorm):
            module.weight.data.fill_(1.0)
        elif isinstance(module, Block):
            for writer in (module.attention.out, module.feed_forward.down):
                writer.weight.data.normal_(std=deviation / math.sqrt(2 * self.config.num_hidden_layers))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (B, T, V), and the loss where `labels` (B, T) are given.

        Args:
            input_ids: (B, T) int64, or inputs_embeds (B, T, C).
            attention_mask: (B, S) with 1 for tokens and 0 for padding, cached tokens included.
            position_ids: (B, T) int64; by default counted from 0, past the cache, padding left out. A training
                offset is given this way. With a cache, keys are counted from the mask.
            logits_to_keep: compute logits for the last so many tokens only; 0 for all.
        """
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache) and not self.training:
            cache = DynamicCache()
        if position_ids is None:
            position_ids = self._positions(hidden, attention_mask, cache)
        position_ids = position_ids.expand(hidden.shape[0], -1)
        context = AttentionContext(self.positional, position_ids, attention_mask, cache)
        hidden = self.positional.embed(hidden, position_ids)
        for block in self.blocks:
            hidden = block(hidden, context)
        logits = self.head(self.norm(hidden[:, -logits_to_keep:]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _positions(self, hidden: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
        past, length = cache.get_seq_length() if cache is not None else 0, hidden.shape[1]
        if attention_mask is not None:
            return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
        return torch.arange(past, past + length, device=hidden.device)[None]


AutoConfig.register(ExPEConfig.model_type, ExPEConfig, exist_ok=True)
AutoModelForCausalLM.register(ExPEConfig, ExPEForCausalLM, exist_ok=True)
