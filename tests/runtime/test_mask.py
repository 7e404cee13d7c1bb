"""Attention masks that are longer than the rows: which columns are tokens, and that nothing else comes of it."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expe_edge.runtime import Generator
from expe_edge.runtime.mask import UNIT, Mask, RoundedMask, rounded
from expe_edge.runtime.memory import plans_runs
from expe_edge.runtime.session import PackageSession, Step


@given(st.integers(1, 2**20), st.integers(1, 512))
def test_steps_and_other_runs_share_no_length(longest: int, tokens: int) -> None:
    length = rounded(longest, tokens)
    assert 0 <= length - longest < 2 * UNIT
    assert length % (2 * UNIT) == (UNIT if tokens == 1 else 0)


def bound(mask: Mask, session: PackageSession, longest: int) -> np.ndarray:
    """Return the mask as a run finds it."""
    mask.bind(session.session.io_binding(), longest)
    found: np.ndarray = mask.value.numpy()
    return found.copy()


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_mask_follows_its_rows(generator: Generator, tokens: int) -> None:
    """It is right after steps, and after a row has been taken back, cleared, or read further by itself."""
    session = generator.session
    cache = session.new_cache(3, 500)
    mask = RoundedMask(cache, tokens)
    random = np.random.default_rng(0)
    for turn in range(60):
        row = cache.row(int(random.integers(3)))
        match turn % 4:
            case 0:
                list(session.prefill(row, random.integers(1, 300, size=int(random.integers(1, 25)))))
            case 1:
                row.truncate(int(random.integers(row.read + 1)))
            case 2 if turn > 40:
                row.clear()
        longest = cache.prepare(tokens)
        found = bound(mask, session, longest)
        assert found.shape == (3, min(rounded(longest, tokens), cache.columns))
        assert np.array_equal(found, np.arange(found.shape[1]) < (cache.lengths + tokens)[:, None])


def test_longer_masks_change_no_logits(generator: Generator, text: list[int]) -> None:
    """Runs of every length with masks as long as their rows, and rounded ones; the last fills the cache."""
    session, found = generator.session, []
    for kind in (Mask, RoundedMask):
        cache, logits = session.new_cache(1, 103), []
        for count in (1, 31, 1, 1, 5, 60, 1, 1, 1, 1):
            step = Step(session, cache, count)
            step.mask = kind(cache, count)
            begin = int(cache.lengths[0])
            logits.append(step.run(np.array([text[begin : begin + count]]))[0].copy())
        found.append(np.concatenate(logits))
    assert np.array_equal(found[0], found[1])


def test_who_plans(cached_generator: Generator) -> None:
    manifest = cached_generator.session.package.manifest
    options: ort.SessionOptions = cached_generator.session.session.get_session_options()
    assert options.enable_mem_pattern is plans_runs(manifest) is not manifest.contract.growing_cache
