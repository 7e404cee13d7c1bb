"""Caches filled to a depth, processes of their own, memory and bandwidth."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from expe_edge.errors import GenerationError, PackageError
from expe_edge.export.exporter import export
from expe_edge.package.contract import GraphContract
from expe_edge.package.directory import read_package
from expe_edge.quant.recipe import Recipe
from expe_edge.runtime import PackageSession
from expe_edge.speed.apart import Apart
from expe_edge.speed.bandwidth import read_bandwidth, weight_bytes
from expe_edge.speed.bench import OpenedResult, Running
from expe_edge.speed.measuring import in_turn, peak_bytes, read
from expe_edge.speed.timed import TimedPackage, filled
from tests.conftest import needs_int8_cache

RECIPES = [
    Recipe(),
    pytest.param(Recipe(cache="int8"), marks=needs_int8_cache),
    Recipe(portable=True),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=["shared", "int8", "growing"])
def test_a_filled_cache_goes_on_as_one_that_has_read(checkpoint: Path, tmp_path: Path, recipe: Recipe) -> None:
    """Positions, mask and what is there: a row read token by token and at once agree, and depend on what is there."""
    (exported,) = export(checkpoint, tmp_path / "out", [recipe])
    session = PackageSession.load(exported.path, threads=1)
    tokens = np.arange(5, dtype=np.int64)

    def logits(depth: int, single: int) -> np.ndarray:
        cache, rows = filled(session, depth, len(tokens)), list[np.ndarray]()
        assert cache.lengths.tolist() == [depth]
        read(session, cache, tokens, single, keep=lambda found: rows.append(found.copy()))
        assert cache.lengths.tolist() == [depth + len(tokens)]
        return np.concatenate(rows)

    together, single = logits(700, 0), logits(700, 5)  # beyond what repeats
    assert np.isfinite(together).all()
    np.testing.assert_allclose(together, single, rtol=0, atol=1e-3)
    assert np.abs(together - logits(0, 0)).max() > 1e-2
    with pytest.raises(GenerationError, match="the cache holds 705 tokens"):
        read(session, filled(session, 700, 5), np.zeros(6, dtype=np.int64), 6)


def test_reading_times_every_single_token(packages: Path) -> None:
    session = PackageSession.load(packages / "float32", threads=1)
    tokens = np.arange(12, dtype=np.int64)

    prefill, steps = read(session, session.new_cache(1, 12), tokens, 4)

    assert len(steps) == 4
    assert min(prefill, *steps) > 0
    assert read(session, session.new_cache(1, 12), tokens, 0)[1] == []
    assert in_turn([session, session], tokens, 4, 3).shape == (3, 2, 2)


def test_a_process_of_its_own_answers_raises_and_ends(packages: Path) -> None:
    with Apart(TimedPackage, packages / "float32", 1, "cpu") as process:
        seconds, size = process.call("opened")
        assert seconds > 0
        assert 10e6 < size != peak_bytes()
        timing = process.call("decode", 40, 3)
        assert timing.cache_bytes == 43 * read_package(packages / "float32").manifest.contract.cache_bytes
        with pytest.raises(GenerationError, match="positions of this model's encoding"):
            process.call("decode", 2**40, 1)
        assert process.call("first_token", 3) > 0
    with pytest.raises(OSError, match="closed"):
        process.call("opened")


def test_what_cannot_be_made_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="no such package directory"):
        Apart(TimedPackage, tmp_path / "none", 1, "cpu")


def test_a_process_that_is_killed_is_one_line() -> None:
    with pytest.raises(GenerationError, match=r"ended by itself \(exit code -9\)"):
        Apart(signal.raise_signal, signal.SIGKILL)


def test_weights_that_a_step_reads(packages: Path) -> None:
    manifest = read_package(packages / "float32").manifest
    parts = {part["part"]: part["bytes"] for part in manifest.parts}
    assert "head" in parts  # not tied
    assert weight_bytes(manifest) == sum(parts.values()) - parts["embedding"] - parts["graph"]

    half = read_package(packages / "float16").manifest
    assert weight_bytes(half) == pytest.approx(weight_bytes(manifest), rel=0.02)  # computed in float32


def test_bandwidth() -> None:
    assert 1e8 < read_bandwidth(1 << 20, 2) < 1e13
    assert read_bandwidth(1, 1) > 0


def test_a_step_reads_no_more_than_its_heads_see() -> None:
    """One of two heads sees 100 tokens; a head has 2 × 8 numbers of 4 bytes for a token in each layer."""
    contract = GraphContract(layers=3, key_value_heads=2, head_size=8, vocab_size=10, windows=(0, 100))
    opened = OpenedResult("windowed", 1, [1.0] * 3, 0, False, 1, 1000, 1000, "float32", contract.cache_bytes)
    with Apart(dict) as process:
        running = Running(process, opened, contract)
    token = 3 * 2 * 8 * 4

    assert [running.step_bytes(depth) for depth in (0, 50, 100, 5000)] == [
        *(1000, 1000 + 100 * token, 1000 + 200 * token, 1000 + 5100 * token),
    ]
