"""Compiled training computes what plain training does, and changes no name of a checkpoint."""

from __future__ import annotations

import pytest
import torch

from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.training.compiling import compile_model
from tests.strategies import random_tokens, small_config

RECIPE = {"softplus": True, "content_heads": 1, "temperature": 0.3}


def loss_and_gradients(model: ExPEForCausalLM, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler reads it
def test_loss_and_gradients_are_those_of_the_plain_model() -> None:
    """Traced by torch's compiler as for a GPU, and run operator by operator: kernels are torch's own business."""
    torch.manual_seed(0)
    model = ExPEForCausalLM(small_config(output_gate=True, positional_parameters=RECIPE)).train()
    names, tokens = list(model.state_dict()), torch.from_numpy(random_tokens(model.config, 30, batch=2))
    plain, gradients = loss_and_gradients(model, tokens)

    compile_model(model, backend="eager")
    torch._dynamo.utils.counters.clear()
    compiled, found = loss_and_gradients(model, tokens)

    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3  # a block, and the loss
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(found, gradients)
    assert list(model.state_dict()) == names
