"""How far the graphs for GPUs are from float64, by position, with a GPU's arithmetic of half precision.

    python -m benchmarks.gpu_precision demo/checkpoint

No GPU is needed. onnxruntime has few kernels of float16 on CPUs and computes such a graph in float32, so the float16
graph runs in the ONNX reference evaluator: every node gives float16, sums are taken in float32, and attention rounds
its scores and weights to float16, as onnxruntime's unfused CUDA kernel does; fused ones round less.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from expe_edge.divergence import divergence
from expe_edge.export.fold import extract_weights
from expe_edge.graph.build import build_graph, graph_contract
from expe_edge.graph.linears import Float16, Float32
from expe_edge.graph.matrices import FloatMatrix
from expe_edge.graph.nodes import FLOAT16
from expe_edge.graph.run import open_graph, run_graph
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.text.tokenization import encode_documents
from expe_edge.training.checkpoint import load_checkpoint

Array = np.ndarray[Any, Any]


class MatMul(OpRun):  # type: ignore[misc]  # onnx publishes no types
    """The product of ONNX, its sums in float32."""

    op_domain = ""

    def _run(self, left: Array, right: Array) -> tuple[Array]:
        return ((left.astype(np.float32) @ right.astype(np.float32)).astype(left.dtype),)


class SkipSimplifiedLayerNormalization(OpRun):  # type: ignore[misc]  # onnx publishes no types
    """A sum and its RMSNorm, computed in float32."""

    op_domain = "com.microsoft"

    def _run(self, hidden: Array, skip: Array, gain: Array, epsilon: float | None = None) -> tuple[Array, ...]:
        total = (hidden.astype(np.float32) + skip.astype(np.float32)).astype(hidden.dtype)
        wide = total.astype(np.float32)
        normed = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + epsilon) * gain.astype(np.float32)
        return normed.astype(hidden.dtype), np.zeros(0, np.float32), np.zeros(0, np.float32), total


class MultiHeadAttention(OpRun):  # type: ignore[misc]  # onnx publishes no types
    """Attention (B, T, H·D) over keys and values (B, H, S, D) with a bias (B, H, T, S), in three rounded steps."""

    op_domain = "com.microsoft"

    def _run(self, query: Array, key: Array, value: Array, *added: Array, num_heads: int | None = None) -> tuple[Array]:
        assert num_heads is not None
        batch, tokens, width = query.shape
        half = query.dtype
        headed = query.reshape(batch, tokens, num_heads, -1).swapaxes(1, 2).astype(np.float32)
        scores = headed @ key.astype(np.float32).swapaxes(2, 3) / np.sqrt(width // num_heads)
        scores = scores.astype(half).astype(np.float32)
        scores = scores + added[-1].astype(np.float32)  # in front of it stand inputs that are left away
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = (weights / weights.sum(axis=-1, keepdims=True)).astype(half).astype(np.float32)
        mixed = (weights @ value.astype(np.float32)).astype(half)
        return (mixed.swapaxes(1, 2).reshape(batch, tokens, -1),)


class GatherElements(OpRun):  # type: ignore[misc]  # onnx publishes no types
    """That of ONNX, whose own evaluator fails beyond 32 elements."""

    op_domain = ""

    def _run(self, data: Array, indices: Array, axis: int | None = None) -> tuple[Array]:
        return (np.take_along_axis(data, indices, axis=axis or 0),)


class ScatterND(OpRun):  # type: ignore[misc]  # onnx publishes no types
    """That of ONNX at once, where its own evaluator takes index by index."""

    op_domain = ""

    def _run(self, data: Array, indices: Array, updates: Array, reduction: str | None = None) -> tuple[Array]:
        del reduction
        written = data.copy()
        written[tuple(np.moveaxis(indices, -1, 0))] = updates
        return (written,)


OPERATORS = [GatherElements, ScatterND, MatMul, SkipSimplifiedLayerNormalization, MultiHeadAttention]


def exact_logits(model: ExPEForCausalLM, tokens: Array) -> Array:
    """Return logits (T, V) in float64."""
    with torch.inference_mode():
        logits: torch.Tensor = model.double()(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits
    model.float()
    return logits[0].numpy()


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--lengths", default=64, show_default=True, help="Of the text, in training lengths.")
def main(checkpoint: Path, lengths: int) -> None:
    """Print a table of CHECKPOINT's logits by position: mean KL divergence from float64, and the largest difference."""
    opened = load_checkpoint(checkpoint)
    config, weights = opened.config, extract_weights(opened.model, folded=True)
    stream = np.concatenate(encode_documents(opened.tokenizer, opened.corpus().held_out)).astype(np.int64)
    tokens = stream[: lengths * config.training_length]
    expected = exact_logits(opened.model, tokens)
    single = run_graph(
        open_graph(build_graph(weights, Float32(), gpu="float32").model),
        graph_contract(config, gpu="float32"),
        tokens,
    )
    embedding = FloatMatrix(weights.embedding.T, FLOAT16)
    half = run_graph(
        ReferenceEvaluator(
            build_graph(weights, Float16(), embedding=embedding, gpu="float16").model, new_ops=OPERATORS
        ),
        graph_contract(config, gpu="float16"),
        tokens,
    )
    bounds = [0] + [config.training_length << power for power in range(lengths.bit_length())]
    names = [f"{low // config.training_length}–{high // config.training_length} N" for low, high in _pairs(bounds)]
    print(f"| {len(tokens)} tokens | {' | '.join(names)} |")
    print(f"|---{'|---' * len(names)}|")
    for name, found in (("float32", single), ("float16", half)):
        rows = [(expected[low:high], found[low:high]) for low, high in _pairs(bounds)]
        print(f"| {name}, mean KL | {' | '.join(f'{divergence(*row).mean():.2g}' for row in rows)} |")
        print(f"| {name}, largest difference | {' | '.join(f'{np.abs(a - b).max():.2g}' for a, b in rows)} |")


def _pairs(bounds: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(bounds))


if __name__ == "__main__":
    main()
