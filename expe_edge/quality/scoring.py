"""Logits of whole texts through one interface, whatever computes them: a checkpoint in PyTorch or a package."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from expe_edge.errors import ConfigError
from expe_edge.package.directory import TOKENIZER_FILE, is_package
from expe_edge.package.manifest import MANIFEST_FILE
from expe_edge.runtime.session import PREFILL_CHUNK, PackageSession
from expe_edge.text.tokenization import load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from expe_edge.training.checkpoint import Checkpoint

Ids = npt.NDArray[np.int64]
Float = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
#: Tokens that a GPU reads at once.
GPU_CHUNK = 2048


class Scorer(Protocol):
    """A model that can be asked for the logits of a text.

    Attributes:
        training_length: N. corpus: what `corpus.load_corpus` needs to find the training text and its held-out part.
    """

    path: Path
    training_length: int
    corpus: dict[str, Any]

    def logits(self, tokens: Ids) -> Iterator[Float]:
        """Yield logits (t, V) for consecutive chunks of `PREFILL_CHUNK` tokens (the last may be shorter) of (T,)."""
        ...


class CheckpointScorer:
    """A checkpoint in PyTorch, float32, with a cache; on a GPU where there is one."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        import torch

        self.model, self.path = checkpoint.model.to("cuda" if torch.cuda.is_available() else "cpu"), checkpoint.path
        self.training_length: int = checkpoint.config.training_length
        self.corpus = checkpoint.sources

    def logits(self, tokens: Ids) -> Iterator[Float]:
        for chunk in self._logits(tokens, PREFILL_CHUNK):
            yield chunk.cpu().numpy()

    def losses(self, tokens: Ids, begin: int) -> tuple[Double, Bools]:
        """Return the loss of each of `tokens[begin:]` in nats, (t,), and whether it is the likeliest, (t,).

        On the model's own device, which hands over no logits: those of a vocabulary take longer than a GPU's work.
        """
        import torch

        chunk = GPU_CHUNK if self.model.device.type == "cuda" else PREFILL_CHUNK
        targets, row = torch.from_numpy(tokens[begin:]).to(self.model.device), begin - 1
        losses, likeliest = [], []
        for logits in self._logits(tokens[:-1], chunk, first=row):
            of_chunk, targets = targets[: len(logits)], targets[len(logits) :]
            losses.append(torch.nn.functional.cross_entropy(logits.double(), of_chunk, reduction="none").cpu().numpy())
            likeliest.append((logits.argmax(dim=-1) == of_chunk).cpu().numpy())
        return np.concatenate(losses), np.concatenate(likeliest)

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


class PackageScorer:
    """A package in onnxruntime."""

    def __init__(self, session: PackageSession) -> None:
        manifest = session.package.manifest
        load_tokenizer(session.package.path, session.contract.vocab_size)  # the ids of texts are columns of the logits
        self.session, self.path = session, session.package.path
        self.training_length = manifest.training_length
        self.corpus = dict(manifest.corpus)

    def logits(self, tokens: Ids) -> Iterator[Float]:
        cache = self.session.new_cache(1, len(tokens))
        yield from self.session.prefill(cache, tokens)


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
