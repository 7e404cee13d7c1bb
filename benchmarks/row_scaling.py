"""What row scaling before the feed-forward's second product is worth to int8, in KL divergence to float32.

python -m benchmarks.row_scaling demo/checkpoint
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np

from expe_edge.calibration.sensitivity import Divergence
from expe_edge.export.exporter import open_exporter
from expe_edge.graph.build import build_graph
from expe_edge.graph.linears import DynamicInt8, FormatOptions, StaticInt8
from expe_edge.text.tokenization import encode_documents


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
    exporter = open_exporter(checkpoint)
    evidence, length = exporter.evidence, 16 * exporter.config.training_length
    held_out = encode_documents(exporter.source.tokenizer, exporter.text.corpus.held_out)
    texts = [ids[:length].astype(np.int64) for ids in held_out if len(ids) >= length][:documents]
    measure, options = Divergence(evidence, texts), FormatOptions(ranges=evidence.ranges)
    for kind in (DynamicInt8(), PlainDynamic(), StaticInt8(options), PlainStatic(options)):
        loss = measure.of(build_graph(evidence.weights, kind).model)
        scaled = type(kind) in (DynamicInt8, StaticInt8)
        print(json.dumps({"format": kind.name, "row_scaling": scaled, "mean_kl": loss.kl, "kl_stderr": loss.kl_stderr}))


if __name__ == "__main__":
    main()
