"""The text that an export measures on: windows to calibrate, beginnings of documents, one long text to validate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from expe_edge.corpus import Corpus
from expe_edge.errors import CorpusError
from expe_edge.quant.calibration import Calibration, sample_windows
from expe_edge.tokenization import encode_documents

Ids = npt.NDArray[np.int64]


@dataclass
class CalibrationText:
    """A corpus as the model's tokenizer reads it. training_length: N, tokens."""

    corpus: Corpus
    tokenizer: Tokenizer
    training_length: int
    calibration: Calibration

    @cached_property
    def windows(self) -> list[Ids]:
        """Random windows (N,) of the training text.

        Raises:
            CorpusError: less text than one window.
        """
        stream = np.concatenate(encode_documents(self.tokenizer, self.corpus.training))
        return sample_windows(stream, self.training_length, self.calibration)

    def beginnings(self, length: int, count: int) -> list[Ids]:
        """Return the first `length`·N tokens of up to `count` random documents of the training text.

        Raises:
            CorpusError: no document is that long.
        """
        tokens = length * self.training_length
        # A token is at least one byte, so shorter texts need not be encoded.
        documents = [document for document in self.corpus.training if len(document.text.encode()) >= tokens - 1]
        np.random.default_rng(self.calibration.seed).shuffle(documents)
        chosen: list[Ids] = []
        for document in documents:
            (ids,) = encode_documents(self.tokenizer, [document])
            if len(ids) >= tokens:
                chosen.append(ids[:tokens].astype(np.int64))
            if len(chosen) == count:
                break
        if not chosen:
            raise CorpusError(f"no document of {tokens} tokens to measure on; give longer text")
        return chosen

    def longest(self, tokens: int) -> Ids:
        """Return the longest document, held-out if there is one, cut or repeated to `tokens` tokens."""
        document = max(self.corpus.held_out or self.corpus.training, key=lambda document: len(document.text))
        (ids,) = encode_documents(self.tokenizer, [document])
        return np.resize(ids[:tokens], tokens).astype(np.int64)
