"""What row scaling before the feed-forward's second product is worth to int8, in KL divergence to float32.

python -m benchmarks.row_scaling demo/checkpoint
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import onnxruntime as ort

from expe_edge.checkpoint import load_checkpoint
from expe_edge.export.fold import extract_weights
from expe_edge.export.graph import build_graph, graph_contract
from expe_edge.export.parity import run_graph
from expe_edge.quant.calibration import Calibration, measure_ranges, sample_windows
from expe_edge.quant.formats import DynamicInt8, Float32, FormatOptions, LinearFormat, StaticInt8
from expe_edge.statistics import divergence
from expe_edge.tokenization import encode_documents


class PlainDynamic(DynamicInt8):
    """int8-dynamic without row scaling."""

    rounds_activations = False


class PlainStatic(StaticInt8):
    """int8-static without row scaling."""

    rounds_activations = False


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--documents", default=8, show_default=True)
def main(checkpoint: Path, documents: int) -> None:
    """Print, as JSON lines, the mean KL divergence over held-out documents up to 16 N, with and without."""
    opened = load_checkpoint(checkpoint)
    corpus, contract = opened.corpus(), graph_contract(opened.config)
    length = 16 * opened.config.training_length
    texts = [ids[:length].astype(np.int64) for ids in encode_documents(opened.tokenizer, corpus.held_out)]
    texts = [tokens for tokens in texts if len(tokens) == length][:documents]
    weights = extract_weights(opened.model, folded=True)
    calibration, plain = Calibration(), build_graph(weights, Float32())
    stream = np.concatenate(encode_documents(opened.tokenizer, corpus.training))
    windows = sample_windows(stream, opened.config.training_length, calibration)
    ranges = measure_ranges(plain, contract, windows, calibration)

    options = FormatOptions(ranges=ranges)

    def logits(linear: LinearFormat) -> np.ndarray:
        proto = build_graph(weights, linear).model
        session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        return np.concatenate([run_graph(session, contract, tokens) for tokens in texts])

    reference = logits(Float32())
    for kind in (DynamicInt8(), PlainDynamic(), StaticInt8(options), PlainStatic(options)):
        divergences = divergence(reference, logits(kind)).reshape(len(texts), -1).mean(axis=1)
        spread = float(divergences.std(ddof=1) / len(texts) ** 0.5)
        scaled = type(kind) in (DynamicInt8, StaticInt8)
        mean = float(divergences.mean())
        print(json.dumps({"format": kind.name, "row_scaling": scaled, "mean_kl": mean, "kl_stderr": spread}))


if __name__ == "__main__":
    main()
