"""The model: a small pre-norm decoder with RMSNorm and any positional encoding of the registry.

Notation: B batch · T query tokens · S keys (cached and new) · C hidden size · H heads · Hkv key/value heads ·
D head size · V vocabulary · G limbs of a position's code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, __version__
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from expe_edge.errors import unknown_name
from expe_edge.model.attention import Attention, AttentionContext, mask_positions
from expe_edge.model.config import ExPEConfig
from expe_edge.model.encoding import PositionalEncoding
from expe_edge.model.encodings import make_encoding


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020) with gate and up in one product, or GELU."""

    def __init__(self, config: ExPEConfig) -> None:
        super().__init__()
        self.gated = config.hidden_act == "swiglu"
        width = config.intermediate_size * (2 if self.gated else 1)
        self.up = nn.Linear(config.hidden_size, width, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        wide = self.up(hidden)
        if self.gated:
            gate, up = wide.chunk(2, dim=-1)
            active = F.silu(gate) * up
        else:
            active = F.gelu(wide)
        written: Tensor = self.down(active)
        return written


class Block(nn.Module):
    def __init__(self, config: ExPEConfig, layer: int, positional: PositionalEncoding) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config, layer, positional)
        self.feed_forward_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), context)
        mixed: Tensor = hidden + self.feed_forward(self.feed_forward_norm(hidden))
        return mixed


#: Keywords of the loss, as `Trainer` gives them.
LOSS_KEYWORDS = ("num_items_in_batch", "ignore_index", "shift_labels")
#: Keywords of transformers' callers, with the one value each that asks for what `forward` does anyway.
OUTPUT_KEYWORDS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}


def check_keywords(keywords: Mapping[str, Any]) -> None:
    """Raise `TypeError` for a keyword that `forward` does not know, or that asks for what it does not return."""
    for name, value in keywords.items():
        if name not in (*LOSS_KEYWORDS, *OUTPUT_KEYWORDS):
            known = {*signature(ExPEForCausalLM.forward).parameters, *LOSS_KEYWORDS, *OUTPUT_KEYWORDS}
            raise TypeError(unknown_name("keyword", name, known - {"self", "kwargs"}))
        if name in OUTPUT_KEYWORDS and value not in (None, OUTPUT_KEYWORDS[name]):
            raise TypeError(f"{name} is {value}; it must be {OUTPUT_KEYWORDS[name]}: logits and cache are all there is")


class ExPEForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers publishes no types
    """Decoder-only language model; `generate` and `save_pretrained` are transformers' own."""

    config_class = ExPEConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ("Block",)
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012  # transformers' own attribute

    def __init__(self, config: ExPEConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positional = make_encoding(config)
        blocks = nn.ModuleList(Block(config, layer, self.positional) for layer in range(config.num_hidden_layers))
        self.blocks = cast("Sequence[Block]", blocks)  # torch's type of a list does not say of what
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *arguments: Any, **settings: Any) -> ExPEForCausalLM:
        """Do as transformers does; `dtype`, which it knows since 4.56, is `torch_dtype` before that."""
        if "dtype" in settings and tuple(map(int, __version__.split(".")[:2])) < (4, 56):
            settings["torch_dtype"] = settings.pop("dtype")
        model: ExPEForCausalLM = super().from_pretrained(*arguments, **settings)
        return model

    def _initialize_weights(self, module: nn.Module, *_: Any) -> None:
        """Initialize `module`, which may be a `Block`.

        transformers 5 asks whether the class is its own, and for others skips modules that hold no parameter directly.
        """
        super()._initialize_weights(module)

    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights; those that write to the residual stream scaled down by its depth (GPT-2).

        A `Block` comes after its linears, and draws its own weights again. transformers 5 marks what a checkpoint has
        given, and has `nn.init` leave that alone.
        """
        deviation = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=deviation)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Block):
            for writer in (module.attention.out, module.feed_forward.down):
                nn.init.normal_(writer.weight, std=deviation / math.sqrt(2 * self.config.num_hidden_layers))
            if not getattr(module.attention.qkv.weight, "_is_hf_initialized", False):
                self.positional.begin(module.attention.qkv.weight)

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
        cache: Cache | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (B, T, V), and the loss where `labels` (B, T) are given.

        Args:
            input_ids: (B, T) int64, or inputs_embeds (B, T, C).
            attention_mask: (B, S) with 1 for tokens and 0 for padding, cached tokens included.
            position_ids: (B, T) int64; by default counted from 0, past the cache, padding left out. A training
                offset is given this way. With a cache, keys are counted from the mask.
            past_key_values: keys and values of the tokens before.
            logits_to_keep: compute logits for the last so many tokens only; 0 for all.
            cache: what releases of transformers 5 call `past_key_values`.
            cache_position: of transformers 4; not read, as it follows from the length of the cache.
            kwargs: `LOSS_KEYWORDS` and `OUTPUT_KEYWORDS`.

        Raises:
            TypeError: a keyword that is unknown, or asks for what the model does not return, or a second cache.
        """
        check_keywords(kwargs)
        if cache is not None and past_key_values is not None:
            raise TypeError("cache and past_key_values are one argument; give it once")
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache) and not self.training:
            cache = DynamicCache()
        hidden = self.hidden_states(input_ids, attention_mask, position_ids, cache, inputs_embeds)
        logits = self.head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            terms = {name: value for name, value in kwargs.items() if name in LOSS_KEYWORDS}
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **terms)
        return CausalLMOutputWithPast(loss, logits, cache)  # the cache's field has another name in transformers 5

    def hidden_states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Return what enters the head, (B, T, C); arguments as of `forward`."""
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = self._positions(hidden, attention_mask, cache)
        position_ids = position_ids.expand(hidden.shape[0], -1)
        context = AttentionContext(self.positional, position_ids, attention_mask, cache)
        hidden = self.positional.embed(hidden, position_ids)
        for block in self.blocks:
            hidden = block(hidden, context)
        normed: Tensor = self.norm(hidden)
        return normed

    def _positions(self, hidden: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
        past, length = cache.get_seq_length() if cache is not None else 0, hidden.shape[1]
        if attention_mask is not None:
            return mask_positions(attention_mask)[:, -length:]
        return torch.arange(past, past + length, device=hidden.device)[None]


AutoConfig.register(ExPEConfig.model_type, ExPEConfig, exist_ok=True)
AutoModelForCausalLM.register(ExPEConfig, ExPEForCausalLM, exist_ok=True)
