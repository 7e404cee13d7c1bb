"""How far float32 logits are from float64 ones, by length, in each way of computing them.

python -m benchmarks.precision demo/checkpoint
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import onnxruntime as ort
import torch

from expe_edge.export.fold import extract_weights
from expe_edge.graph.build import build_graph, graph_contract
from expe_edge.graph.linears import Float32
from expe_edge.graph.run import run_graph
from expe_edge.model import attention
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.text.tokenization import encode_documents
from expe_edge.training.checkpoint import load_checkpoint


def torch_logits(model: ExPEForCausalLM, tokens: np.ndarray, block: int) -> np.ndarray:
    """Logits (T, V) of one forward pass with queries in blocks of `block`."""
    before, attention.QUERY_BLOCK = attention.QUERY_BLOCK, block
    try:
        with torch.inference_mode():
            logits: torch.Tensor = model(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits
        return logits[0].numpy()
    finally:
        attention.QUERY_BLOCK = before


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--lengths", default="1,16,64", show_default=True, help="In training lengths.")
def main(checkpoint: Path, lengths: str) -> None:
    """Print, as JSON lines, the largest difference to float64 of PyTorch and of both graphs."""
    opened = load_checkpoint(checkpoint)
    model, contract = opened.model, graph_contract(opened.config)
    stream = np.concatenate(encode_documents(opened.tokenizer, opened.corpus().held_out)).astype(np.int64)
    sessions = {
        name: ort.InferenceSession(
            build_graph(extract_weights(model, folded=folded), Float32()).model.SerializeToString(),
            providers=["CPUExecutionProvider"],
        )
        for name, folded in (("graph, folded", True), ("graph, inline", False))
        if folded or opened.config.needs_folding is None
    }
    for length in (int(part) * opened.config.training_length for part in lengths.split(",")):
        tokens = stream[:length]
        exact = torch_logits(model.double(), tokens, attention.QUERY_BLOCK)
        model.float()
        found = {
            "torch, blocks of 256": torch_logits(model, tokens, 256),
            "torch, one block": torch_logits(model, tokens, length),
            **{name: run_graph(session, contract, tokens) for name, session in sessions.items()},
        }
        for name, logits in found.items():
            print(
                json.dumps({"way": name, "tokens": length, "largest_difference": float(np.abs(logits - exact).max())})
            )


if __name__ == "__main__":
    main()
