"""Logits of whole texts through one interface, whatever computes them: a checkpoint in PyTorch or a package."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from expe_edge.divergence import Double, Float, log_softmax
from expe_edge.errors import ConfigError
from expe_edge.package.directory import TOKENIZER_FILE, is_package
from expe_edge.package.manifest import MANIFEST_FILE
from expe_edge.runtime.memory import PREFILL_CHUNK
from expe_edge.runtime.session import PackageSession
from expe_edge.text.tokenization import load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from expe_edge.training.checkpoint import Checkpoint

Ids = npt.NDArray[np.int64]
#: Tokens that a GPU reads at once.
GPU_CHUNK = 2048


@dataclass(frozen=True)
class Predictions:
    """What a model says of consecutive tokens of a text, each predicted from all tokens before it.

    nll: the loss of each token in nats, (t,). likeliest: whether it is the model's likeliest prediction, (t,).
    """

    nll: Double
    likeliest: npt.NDArray[np.bool_]


class Scorer(Protocol):
    """A model that can be asked for the logits of a text, and so for its losses.

    Attributes:
        training_length: N. corpus: what `corpus.load_corpus` needs to find the training text and its held-out part.
    """

    path: Path
    training_length: int
    corpus: dict[str, Any]

    def logits(self, tokens: Ids) -> Iterator[Float]:
        """Yield logits (t, V) for consecutive chunks of `PREFILL_CHUNK` tokens (the last may be shorter) of (T,)."""
        ...

    def predictions(self, tokens: Ids, begin: int) -> Predictions:
        """Return what the model says of `tokens[begin:]`, teacher-forced over tokens (T,). `begin` is at least 1."""
        parts: list[Predictions] = []
        row = 0
        for logits in self.logits(tokens[:-1]):  # row p of the logits predicts token p + 1
            first = max(begin - 1 - row, 0)
            if first < len(logits):
                predicted = log_softmax(logits[first:])
                targets = tokens[row + first + 1 : row + len(logits) + 1]
                losses = -predicted[np.arange(len(targets)), targets]
                parts.append(Predictions(losses, predicted.argmax(axis=-1) == targets))
            row += len(logits)
        return _joined(parts)


def _joined(parts: Sequence[Predictions]) -> Predictions:
    return Predictions(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("nll", "likeliest")))


class CheckpointScorer(Scorer):
    """A checkpoint in PyTorch, float32, with a cache; on a GPU where there is one."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        import torch

        self.model, self.path = checkpoint.model.to("cuda" if torch.cuda.is_available() else "cpu"), checkpoint.path
        self.training_length: int = checkpoint.config.training_length
        self.corpus = checkpoint.sources

    def logits(self, tokens: Ids) -> Iterator[Float]:
        for chunk in self._logits(tokens, PREFILL_CHUNK):
            yield chunk.cpu().numpy()

    def predictions(self, tokens: Ids, begin: int) -> Predictions:
        """Do it on the model's own device, which hands over no logits: to move them takes longer than a GPU's work."""
        import torch

        chunk = GPU_CHUNK if self.model.device.type == "cuda" else PREFILL_CHUNK
        targets, parts = torch.from_numpy(tokens[begin:]).to(self.model.device), []
        for logits in self._logits(tokens[:-1], chunk, first=begin - 1):
            of_chunk, targets = targets[: len(logits)], targets[len(logits) :]
            losses = torch.nn.functional.cross_entropy(logits.double(), of_chunk, reduction="none")
            likeliest = logits.argmax(dim=-1) == of_chunk
            parts.append(Predictions(losses.cpu().numpy(), likeliest.cpu().numpy()))
        return _joined(parts)

    def _logits(self, tokens: Ids, chunk: int, first: int = 0) -> Iterator[Tensor]:
        """Yield logits (t, V) float32 of the rows from `first` on, in runs of `chunk` tokens over a cache."""
        import torch
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache()
        for begin in range(0, len(tokens), chunk):
            part = torch.from_numpy(tokens[begin : begin + chunk])[None].to(self.model.device)
            wanted = begin + part.shape[1] - max(begin, first)
            with torch.inference_mode():
                output = self.model(
                    input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=max(wanted, 1)
                )
            if wanted > 0:
                yield output.logits[0].float()


class PackageScorer(Scorer):
    """A package in onnxruntime."""

    def __init__(self, session: PackageSession) -> None:
        manifest = session.package.manifest
        load_tokenizer(session.package.path, session.contract.vocab_size)  # the ids of texts are columns of the logits
        self.session, self.path = session, session.package.path
        self.training_length = manifest.training_length
        self.corpus = dict(manifest.corpus)

    def logits(self, tokens: Ids) -> Iterator[Float]:
        cache = self.session.new_cache(1, len(tokens))
        yield from self.session.prefill(cache, tokens, PREFILL_CHUNK)


def open_scorer(path: Path, threads: int | None = None) -> Scorer:
    """Open a package or a checkpoint, whichever `path` is.

    Raises:
        ConfigError: `path` is neither. PackageError, CheckpointError: it is one, but damaged.
    """
    if not is_checkpoint(path):
        return PackageScorer(PackageSession.load(path, threads=threads))
    from expe_edge.training.checkpoint import load_checkpoint

    return CheckpointScorer(load_checkpoint(path))


def is_checkpoint(path: Path) -> bool:
    """Tell whether `path` is a checkpoint, not a package.

    Raises:
        ConfigError: it is neither.
    """
    if is_package(path):
        return False
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path}: neither a package (no {MANIFEST_FILE}) nor a checkpoint (no config.json)")
    return True


def open_side_by_side(paths: Sequence[Path], threads: int | None = None) -> tuple[list[Scorer], int]:
    """Open every model for `compare`, and say how many of them to compute at once with `threads` (None: all cores).

    Several small models are faster side by side, one thread each, than one after another on all threads.

    Raises:
        As `open_scorer`.
    """
    cores = threads or os.cpu_count() or 1
    at_once = min(cores, len(paths))
    return [open_scorer(path, cores // at_once) for path in paths], at_once


def tokenizer_path(scorer: Scorer) -> Path:
    """Return the file of the scorer's tokenizer."""
    return scorer.path / TOKENIZER_FILE
