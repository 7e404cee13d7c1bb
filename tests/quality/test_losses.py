"""Losses of a checkpoint, taken on its own device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from expe_edge.divergence import log_softmax
from expe_edge.quality.scoring import CheckpointScorer
from expe_edge.training.checkpoint import load_checkpoint


@pytest.mark.parametrize("begin", [1, 2, 255, 256, 257, 300, 599])
def test_losses_of_a_checkpoint_are_those_of_its_logits(checkpoint: Path, begin: int) -> None:
    """Whole, across runs of 256 tokens, and of the last token alone."""
    scorer = CheckpointScorer(load_checkpoint(checkpoint))
    tokens = np.random.default_rng(0).integers(scorer.model.config.vocab_size, size=600)
    logits = np.concatenate(list(scorer.logits(tokens[:-1])))[begin - 1 :]

    found = scorer.predictions(tokens, begin)

    expected = -log_softmax(logits)[np.arange(600 - begin), tokens[begin:]]
    np.testing.assert_allclose(found.nll, expected, rtol=1e-5)
    np.testing.assert_array_equal(found.likeliest, logits.argmax(axis=-1) == tokens[begin:])
