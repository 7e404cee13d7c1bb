"""The text that an export measures on."""

from __future__ import annotations

import numpy as np
import pytest

import expe_edge.calibration.text
from expe_edge.calibration.observations import Calibration, sample_windows
from expe_edge.calibration.text import CalibrationText
from expe_edge.errors import CorpusError
from expe_edge.text.corpus import Corpus
from expe_edge.text.documents import Document
from expe_edge.text.tokenization import encode_documents, train_tokenizer

N, WINDOWS = 8, Calibration(windows=40)
DOCUMENTS = tuple(Document(str(number), f"{number % 10}" * 100) for number in range(30))


def text() -> CalibrationText:
    tokenizer = train_tokenizer(DOCUMENTS, 257)
    return CalibrationText(Corpus(("text",), DOCUMENTS, ()), tokenizer, N, WINDOWS)


def test_windows_are_of_all_the_text_where_it_is_short() -> None:
    stream = np.concatenate(encode_documents(text().tokenizer, DOCUMENTS))
    np.testing.assert_array_equal(text().windows, sample_windows(stream, N, WINDOWS))


def test_windows_of_a_long_text_are_of_some_of_its_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of thirty, whatever stands first; as many windows as ever, and the same each time."""
    monkeypatch.setattr(expe_edge.calibration.text, "MOST_CHARACTERS", 301)
    sampled = text()._sample()
    assert len(sampled) == len({document.name for document in sampled}) == 4
    assert [document.name for document in sampled] != ["0", "1", "2", "3"]
    stream = np.concatenate(encode_documents(text().tokenizer, sampled))
    np.testing.assert_array_equal(text().windows, sample_windows(stream, N, WINDOWS))
    assert len(text().windows) == WINDOWS.windows


def test_windows_of_no_training_text_are_refused() -> None:
    """As where the held-out documents of a model's text are all that is left of it."""
    left = CalibrationText(Corpus(("text",), (), DOCUMENTS), text().tokenizer, N, WINDOWS)
    with pytest.raises(CorpusError, match=f"^the calibration text has 0 tokens, less than one window of {N}; "):
        _ = left.windows
