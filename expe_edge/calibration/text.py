"""The text that an export measures on: windows to calibrate, beginnings of documents, one long text to validate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from expe_edge.calibration.observations import Calibration, sample_windows
from expe_edge.errors import CorpusError
from expe_edge.text.corpus import Corpus
from expe_edge.text.documents import Document
from expe_edge.text.tokenization import encode_documents

Ids = npt.NDArray[np.int64]
#: Characters of the training text that windows are taken from: to encode all of a long one takes minutes.
MOST_CHARACTERS = 2**25


@dataclass
class CalibrationText:
    """A corpus as the model's tokenizer reads it. training_length: N, tokens."""

    corpus: Corpus
    tokenizer: Tokenizer
    training_length: int
    calibration: Calibration

    @cached_property
    def windows(self) -> list[Ids]:
        """Random windows (N,) of the training text, or of a sample of its documents where it is long.

        Raises:
            CorpusError: less text than one window.
        """
        encoded = encode_documents(self.tokenizer, self._sample())
        stream = np.concatenate([np.empty(0, dtype=np.int32), *encoded])  # of which there may be none
        return sample_windows(stream, self.training_length, self.calibration)

    def _sample(self) -> Sequence[Document]:
        """Return the documents of the training text, of a long one only `MOST_CHARACTERS` or so."""
        sizes = [len(document.text) for document in self.corpus.training]
        if sum(sizes) <= MOST_CHARACTERS:
            return self.corpus.training
        shuffled = np.random.default_rng(self.calibration.seed).permutation(len(sizes))
        needed = int(np.searchsorted(np.cumsum(np.array(sizes)[shuffled]), MOST_CHARACTERS)) + 1
        return [self.corpus.training[index] for index in shuffled[:needed]]

    def beginnings(self, lengths: Sequence[int], count: int) -> list[Ids]:
        """Return the beginnings of up to `count` random documents of the training text.

        Args:
            lengths: in training lengths; the first that any document has is that of all beginnings.

        Raises:
            CorpusError: no document is that long.
        """
        for length in lengths:
            if found := list(islice(self._beginnings(length * self.training_length), count)):
                return found
        raise CorpusError(
            f"no document of {lengths[-1] * self.training_length} tokens to measure on; "
            f"{'lower `lengths`, or ' if lengths[-1] > 1 else ''}give longer text with `calibration_data`"
        )

    def _beginnings(self, tokens: int) -> Iterator[Ids]:
        # A token is at least one byte, so shorter texts need not be encoded.
        documents = [document for document in self.corpus.training if len(document.text.encode()) >= tokens - 1]
        np.random.default_rng(self.calibration.seed).shuffle(documents)
        for document in documents:
            (ids,) = encode_documents(self.tokenizer, [document])
            if len(ids) >= tokens:
                yield ids[:tokens].astype(np.int64)

    @cached_property
    def longest_document(self) -> Ids:
        """The longest document, held-out if there is one, (T,)."""
        document = max(self.corpus.held_out or self.corpus.training, key=lambda document: len(document.text))
        (ids,) = encode_documents(self.tokenizer, [document])
        return ids.astype(np.int64)

    def longest(self, tokens: int) -> Ids:
        """Return the longest document, cut or repeated to `tokens` tokens."""
        return np.resize(self.longest_document[:tokens], tokens)
