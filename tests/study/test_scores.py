"""Losses by length that are kept, and the statistics of their differences."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from expe_edge.study.scores import asked_for, paired_difference, read_losses


def test_what_documents_and_seeds_share_cancels_in_a_paired_difference() -> None:
    random = np.random.default_rng(0)
    others = random.normal(size=(3, 8, 2)) + np.array([0.0, 100.0])
    mean, error = paired_difference(others - 0.25, others)
    np.testing.assert_allclose(mean, [-0.25, -0.25])
    np.testing.assert_allclose(error, 0, atol=1e-6)


def test_the_standard_error_is_that_of_crossed_seeds_and_documents() -> None:
    """Over many draws of both, the spread of the mean is what the errors say on average."""
    random = np.random.default_rng(0)
    means, variances = [], []
    for _ in range(2000):
        seeds, documents = random.normal(0, 0.3, (3, 1, 1)), random.normal(0, 0.5, (1, 6, 1))
        mean, error = paired_difference(seeds + documents + random.normal(0, 0.2, (3, 6, 1)), np.zeros((3, 6, 1)))
        means.append(mean[0])
        variances.append(error[0] ** 2)
    assert np.var(means) == pytest.approx(np.mean(variances), rel=0.1)


def test_with_one_seed_documents_alone_are_the_sample_and_with_one_document_nothing_is() -> None:
    losses = np.array([1.0, 2.0, 4.0]).reshape(1, 3, 1)
    mean, error = paired_difference(losses, np.zeros_like(losses))
    assert (mean[0], error[0]) == (pytest.approx(7 / 3), pytest.approx(np.std([1, 2, 4], ddof=1) / np.sqrt(3)))
    assert np.isnan(paired_difference(losses[:, :1], np.zeros((1, 1, 1)))[1]).all()


def test_interrupted_scores_are_gone_on_with(tmp_path: Path) -> None:
    asked, losses = asked_for([1], 2, []), [[2.5], [2.25]]
    partial = tmp_path / "losses"
    assert read_losses(partial, asked) == []
    partial.write_text(json.dumps({"asked": asked, "losses": losses}))
    assert read_losses(partial, asked) == losses
    assert read_losses(partial, {**asked, "documents": 3}) == []
    partial.write_text(partial.read_text()[:20])
    assert read_losses(partial, asked) == []


def test_scores_of_earlier_releases_are_read(tmp_path: Path) -> None:
    """They say nothing of texts: there were none but those held out."""
    kept = tmp_path / "losses.json"
    kept.write_text(json.dumps({"asked": {"lengths": [1, 2], "documents": 1}, "losses": [[2.5, 2.0]]}))
    assert read_losses(kept, asked_for([1, 2], 1, [])) == [[2.5, 2.0]]
    assert read_losses(kept, asked_for([1, 2], 1, ["other.txt"])) == []
