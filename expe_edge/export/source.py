"""What packages are made from: a checkpoint, or a float32 package, which holds the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from tokenizers import Tokenizer

from expe_edge.errors import ExportError, PackageError, reason_of
from expe_edge.export.fold import extract_weights
from expe_edge.graph.run import check_contract, logits_of, open_model, parts_of
from expe_edge.graph.weights import ModelWeights, read_weights
from expe_edge.model.config import ExPEConfig
from expe_edge.package.directory import Package, is_package, read_package
from expe_edge.quant.recipe import WeightRounding
from expe_edge.text.tokenization import load_tokenizer
from expe_edge.training.checkpoint import load_checkpoint

#: Yields the float32 logits (t, V) that a graph is validated against, of `parts_of` tokens (T,). It opens the model and
#: lets go of it after, so that large weights are not held twice.
Reference = Callable[[npt.NDArray[np.int64]], Iterator[npt.NDArray[np.float32]]]


@dataclass(frozen=True)
class Source:
    """A model to make packages of.

    corpus: what `load_corpus` needs to find the training text. origin: what the reference runs in, for messages.
    rounding: what its weights, as they are here, were trained to be rounded to; None where they were not.
    """

    path: Path
    config: ExPEConfig
    weights: ModelWeights
    tokenizer: Tokenizer
    corpus: dict[str, Any]
    reference: Reference
    origin: str
    rounding: WeightRounding | None = None


def open_source(path: Path, *, folded: bool) -> Source:
    """Open a checkpoint, or a float32 package.

    Raises:
        ExportError: a package that holds no float32 weights, or has its positions elsewhere than asked.
        CheckpointError, PackageError: missing or damaged.
    """
    return (
        _from_package(read_package(path), folded=folded) if is_package(path) else _from_checkpoint(path, folded=folded)
    )


def _from_checkpoint(path: Path, *, folded: bool) -> Source:
    checkpoint = load_checkpoint(path)
    weights = extract_weights(checkpoint.model, folded=folded)
    return Source(
        path,
        checkpoint.config,
        weights,
        checkpoint.tokenizer,
        checkpoint.sources,
        _TorchReference(path),
        "PyTorch",
        checkpoint.rounding if folded or not checkpoint.config.encoding_parameters.foldable else None,
    )


@dataclass(frozen=True)
class _TorchReference:
    path: Path

    def __call__(self, tokens: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.float32]]:
        model = load_checkpoint(self.path).model
        with torch.inference_mode():
            hidden = model.hidden_states(torch.from_numpy(tokens)[None])[0]
        for part in parts_of(len(tokens)):
            with torch.inference_mode():
                yield model.head(hidden[part]).float().numpy()


def _from_package(package: Package, *, folded: bool) -> Source:
    manifest = package.manifest
    formats = {manifest.precision, *manifest.linears.values(), manifest.embedding}
    if formats != {"float32"} or manifest.contract.cache_dtype != "float32":
        raise ExportError(
            f"{package.path} holds {manifest.precision} weights, which have lost what another format needs; quantize "
            "the checkpoint or a float32 package"
        )
    if (manifest.positions == "folded") != folded:
        raise ExportError(
            f"{package.path} has its positions {manifest.positions}; use `positions` {manifest.positions}"
        )
    config = ExPEConfig.from_plain(manifest.model)
    weights = read_weights(_load_graph(package), config, folded=folded)
    tokenizer = load_tokenizer(package.path, config.vocab_size)
    return Source(
        package.path,
        config,
        weights,
        tokenizer,
        dict(manifest.corpus),
        _GraphReference(package),
        str(package.path),
        WeightRounding(**manifest.rounding) if manifest.rounding else None,
    )


def _load_graph(package: Package) -> onnx.ModelProto:
    try:
        return onnx.load(package.model_path)
    except Exception as error:  # protobuf's exceptions and onnx's share no narrower base
        raise PackageError(f"{package.model_path}: not a graph that onnx can read ({reason_of(error)})") from error


@dataclass(frozen=True)
class _GraphReference:
    package: Package

    def __call__(self, tokens: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.float32]]:
        contract = self.package.manifest.contract
        session = open_model(self.package.model_path)
        check_contract(session, contract)
        return logits_of(session, contract, tokens)
