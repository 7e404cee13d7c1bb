"""The statistics of `benchmarks.extrapolation`."""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import pytest

from benchmarks.extrapolation import VARIANTS, flags_of, paired_difference
from benchmarks.extrapolation_scores import read_losses
from expe_edge.training.settings import make_settings


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_flags_that_train_takes(variant: str) -> None:
    flags = flags_of(variant)
    names = {flag for flag in flags if flag.startswith("--")}
    assert names <= {"--positional", "--positional-parameter", "--position-offset"}
    make_settings(flags={"positional": flags[flags.index("--positional") + 1]})


def test_a_variant_can_be_spelled_out() -> None:
    assert flags_of("steep=--positional alibi --seed '3'") == ["--positional", "alibi", "--seed", "3"]
    with pytest.raises(click.BadParameter, match="unknown variant 'albi'; available: expe, "):
        flags_of("albi")


def test_interrupted_scores_are_gone_on_with(tmp_path: Path) -> None:
    asked, losses = {"lengths": [1], "documents": 2, "texts": []}, [[2.5], [2.25]]
    partial = tmp_path / "losses"
    assert read_losses(partial, asked) == []
    partial.write_text(json.dumps({"asked": asked, "losses": losses}))
    assert read_losses(partial, asked) == losses
    assert read_losses(partial, {**asked, "documents": 3}) == []
    partial.write_text(partial.read_text()[:20])
    assert read_losses(partial, asked) == []
