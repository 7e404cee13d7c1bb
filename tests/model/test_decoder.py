"""The decoder as a model of transformers, of releases 4 and 5 alike: its cache, its keywords, its weights as saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from expe_edge.model.config import ExPEConfig
from expe_edge.model.decoder import ExPEForCausalLM

PROMPT = torch.tensor([[0, 17, 4, 211, 90, 3, 56]])


def new_model(**changes: Any) -> ExPEForCausalLM:
    """A model of 4 blocks as seed 0 begins it."""
    torch.manual_seed(0)
    model: ExPEForCausalLM = ExPEForCausalLM(ExPEConfig(vocab_size=256, hidden_size=64, **changes)).eval()
    return model


# Generation.


def test_a_loaded_model_generates_the_greedy_tokens_of_passes_without_a_cache(checkpoint: Path) -> None:
    model, new = AutoModelForCausalLM.from_pretrained(checkpoint), 40
    expected = PROMPT
    with torch.inference_mode():
        for _ in range(new):
            chosen = model(input_ids=expected, use_cache=False).logits[:, -1:].argmax(dim=-1)
            expected = torch.cat([expected, chosen], dim=1)
    greedy = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    generated = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **greedy)
    assert generated.tolist() == expected.tolist()
    assert len(set(generated[0].tolist())) > 5


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_known_by_either_name(name: str) -> None:
    model, cache = new_model(), DynamicCache()
    with torch.inference_mode():
        whole = model(input_ids=PROMPT, use_cache=False).logits
        steps = [model(input_ids=token, **{name: cache}).logits for token in torch.split(PROMPT, 1, dim=1)]
    assert cache.get_seq_length() == PROMPT.shape[1]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)


def test_a_cache_is_made_and_returned_unless_it_is_declined() -> None:
    model = new_model()
    logits, cache = model(input_ids=PROMPT).to_tuple()
    assert cache.get_seq_length() == PROMPT.shape[1]
    assert [part.shape for part in model(input_ids=PROMPT, use_cache=False).to_tuple()] == [logits.shape]


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ({"past_key_value": None}, "unknown keyword 'past_key_value'; did you mean 'past_key_values'?"),
        ({"attention_masks": None}, "unknown keyword 'attention_masks'; did you mean 'attention_mask'?"),
        ({"output_attentions": True}, "output_attentions is True; it must be False"),
        ({"return_dict": False}, "return_dict is False; it must be True"),
        ({"cache": DynamicCache(), "past_key_values": DynamicCache()}, "cache and past_key_values are one argument"),
    ],
)
def test_a_keyword_without_effect_is_refused(keyword: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}"):
        new_model()(input_ids=PROMPT, **keyword)


# Initial weights.

#: Two numbers of each weight of the test below, by transformers 4.57.
FIRST_WEIGHTS = [
    [0.0024637543, -0.040775042],
    [-0.02562369, 0.0070588607],
    [-0.00030811815, -0.0137208],
    [-0.016056681, -0.0027206668],
    [-0.0045475233, -0.0055372124],
]


def test_weights_that_write_to_the_residual_stream_begin_smaller_by_its_depth() -> None:
    model = new_model(positional="none", intermediate_size=256)
    for block in model.blocks:
        for weight in (block.attention.qkv.weight, block.feed_forward.up.weight):
            assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        for weight in (block.attention.out.weight, block.feed_forward.down.weight):
            assert weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * 4), rel=0.05)
    assert model.norm.weight.eq(1).all()


def test_a_seed_begins_with_the_weights_it_always_has() -> None:
    """Whatever draws before a weight decides it: those of the last block and of the head, as the first release drew."""
    model = new_model()
    found = [
        weight[0, :2].tolist()
        for weight in (
            model.embedding.weight,
            model.blocks[3].attention.qkv.weight[:, 62:],
            model.blocks[3].attention.out.weight,
            model.blocks[3].feed_forward.down.weight,
            model.head.weight,
        )
    ]
    np.testing.assert_allclose(found, FIRST_WEIGHTS, rtol=1e-6)


# Weights as saved.


def test_a_tied_matrix_is_saved_once_and_tied_when_loaded(tmp_path: Path) -> None:
    model = new_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert [name for name in file.keys() if "head" in name or "embedding" in name] == ["embedding.weight"]  # noqa: SIM118  # no mapping
    loaded = ExPEForCausalLM.from_pretrained(tmp_path)
    assert loaded.head.weight is loaded.embedding.weight
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


def test_matrices_that_are_not_tied_stay_two(tmp_path: Path) -> None:
    model = new_model()
    model.save_pretrained(tmp_path)
    loaded = ExPEForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert not torch.equal(loaded.head.weight, loaded.embedding.weight)


def test_what_a_file_lacks_is_drawn_and_nothing_else(tmp_path: Path) -> None:
    model = new_model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["blocks.1.feed_forward.up.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = ExPEForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    assert loaded["blocks.1.feed_forward.up.weight"].std().item() == pytest.approx(0.02, rel=0.05)
