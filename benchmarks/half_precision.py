"""Loss and gradients of a new model with attention scores in bfloat16, as on a GPU, against float32.

    python -m benchmarks.half_precision --training-length 1024

Both under bfloat16's autocast, on random tokens. Printed for both kinds of weights: the columns that read positions,
whose gradients distances multiply, and the others of the query/key/value products.
"""

from __future__ import annotations

from unittest import mock

import click
import torch
from torch import Tensor

from expe_edge.model.attention import AttentionContext
from expe_edge.model.config import ExPEConfig
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.positions.expe import ExPEParameters


def gradients(model: ExPEForCausalLM, tokens: Tensor, half: torch.dtype | None) -> tuple[float, Tensor, Tensor]:
    """Return the loss, and the gradients of the columns that read positions and of the others."""
    dims = model.config.encoding_parameters.dims
    model.zero_grad()
    scores = mock.patch.object(AttentionContext, "_half", return_value=half)  # whatever the device
    with scores, torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    columns = torch.stack([block.attention.qkv.weight.grad for block in model.blocks])  # type: ignore[misc]
    return loss.item(), columns[..., :dims], columns[..., dims:]


@click.command()
@click.option("--training-length", default=512, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--hidden-size", default=384, show_default=True)
@click.option("--num-attention-heads", default=6, show_default=True)
def main(training_length: int, batch_size: int, hidden_size: int, num_attention_heads: int) -> None:
    """Print both losses, and the relative difference of the gradients."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = ExPEConfig(
        training_length=training_length,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        num_hidden_layers=4,
        vocab_size=4096,
    )
    assert isinstance(config.encoding_parameters, ExPEParameters)
    model = ExPEForCausalLM(config).to(device).train()
    tokens = torch.randint(config.vocab_size, (batch_size, training_length), device=device)
    half, full = gradients(model, tokens, torch.bfloat16), gradients(model, tokens, None)
    print(f"{device}: loss {half[0]:.5f} in bfloat16, {full[0]:.5f} in float32")
    for name, rounded, exact in zip(("positions'", "other"), half[1:], full[1:], strict=True):
        print(f"{name} columns: gradients differ by {((rounded - exact).norm() / exact.norm()).item():.4f}")


if __name__ == "__main__":
    main()
