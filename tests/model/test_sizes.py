"""What a model takes: its weights, and its masks while it runs."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import Cache

import expe_edge.model.attention
from expe_edge.model.attention import AttentionContext
from expe_edge.model.config import LARGEST_GRAPH, ExPEConfig
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.model.encoding import PositionalEncoding
from tests.strategies import random_model, random_tokens, small_config


@pytest.mark.parametrize(
    "shape",
    [{}, {"tie_word_embeddings": True}, {"hidden_act": "gelu"}, {"num_key_value_heads": 2}, {"intermediate_size": 24}],
    ids=str,
)
def test_a_config_knows_how_many_weights_its_model_has(shape: dict[str, object]) -> None:
    model = random_model(small_config(**shape))
    assert model.config.parameter_count == sum(weight.numel() for weight in model.parameters())


def test_a_model_is_too_large_when_its_graph_is() -> None:
    """One more token than fits."""
    config = small_config(hidden_size=1024, tie_word_embeddings=True)
    room = (LARGEST_GRAPH - 4 * (config.parameter_count - 1024 * config.vocab_size)) // (4 * 1024)
    assert ExPEConfig(**{**config.settings(), "vocab_size": room}).too_large is None
    reason = ExPEConfig(**{**config.settings(), "vocab_size": room + 1}).too_large
    assert reason is not None
    assert "take 2.1 GB in float32" in reason


@pytest.mark.parametrize("positional", ["expe", "alibi", "relative"])
def test_without_gradients_one_mask_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch, positional: str) -> None:
    monkeypatch.setattr(expe_edge.model.attention, "QUERY_BLOCK", 16)
    contexts: list[AttentionContext] = []
    create = AttentionContext.__init__

    def remembered(
        self: AttentionContext,
        positional: PositionalEncoding,
        query_positions: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
    ) -> None:
        create(self, positional, query_positions, attention_mask, cache)
        contexts.append(self)

    monkeypatch.setattr(AttentionContext, "__init__", remembered)
    config = small_config(positional=positional)
    model, tokens = random_model(config), torch.from_numpy(random_tokens(config, 40))
    with torch.inference_mode():
        found = model(input_ids=tokens, use_cache=False).logits
    trained = model(input_ids=tokens, use_cache=False).logits
    assert [len(context.blocks) for context in contexts] == [1, 3]
    torch.testing.assert_close(found, trained, rtol=0, atol=0)


def test_hidden_states_are_what_the_head_sees() -> None:
    model: ExPEForCausalLM = random_model(small_config())
    tokens = torch.from_numpy(random_tokens(model.config, 20))
    with torch.inference_mode():
        torch.testing.assert_close(
            model.head(model.hidden_states(tokens)), model(input_ids=tokens, use_cache=False).logits, rtol=0, atol=0
        )
