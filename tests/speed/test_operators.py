"""What a profile says, from real profiles: every node once, grouped by operator."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from expe_edge.export.exporter import export
from expe_edge.export.kernels import optimized_operators
from expe_edge.package.contract import MANY_TOKENS
from expe_edge.package.directory import read_package
from expe_edge.quant.recipe import Recipe
from expe_edge.runtime import PackageSession
from expe_edge.runtime.memory import PREFILL_CHUNK
from expe_edge.speed.measuring import read
from expe_edge.speed.operators import KERNEL, RUN, Event, profiled, run_times
from expe_edge.speed.timed import TimedPackage
from tests.conftest import needs_int8_cache


def decode_events(package: Path, steps: int) -> list[Event]:
    """The profile of so many steps."""
    session = PackageSession.load(package, threads=1)
    tokens = np.zeros(steps, dtype=np.int64)
    logits: list[np.ndarray] = []

    def work(watched: PackageSession) -> None:
        read(watched, watched.new_cache(1, steps), tokens, steps, keep=lambda rows: logits.append(rows.copy()))

    _, events = profiled(session, 1, work)
    (plain,) = session.prefill(session.new_cache(1, steps), tokens)
    np.testing.assert_allclose(np.concatenate(logits), plain, rtol=0, atol=1e-3)
    return events


@pytest.mark.parametrize("precision", ["float32", "int8-weight", "int4-weight"])
def test_the_nodes_of_a_step_are_those_of_the_optimised_graph(packages: Path, precision: str) -> None:
    times = run_times(decode_events(packages / precision, 4), runs=1)

    expected = optimized_operators(packages / precision / "model.onnx")
    assert Counter({each.operator: each.nodes for each in times.operators}) == expected
    assert times.nodes == expected.total()


def test_a_portable_graph_too(packages: Path, tmp_path: Path) -> None:
    (portable,) = export(packages / "float32", tmp_path, [Recipe(portable=True)])

    times = run_times(decode_events(portable.path, 3), runs=1)

    assert times.nodes == optimized_operators(portable.path / "model.onnx").total()


@needs_int8_cache
def test_of_two_branches_the_nodes_of_the_one_that_ran(checkpoint: Path, tmp_path: Path) -> None:
    """An int8 cache is read by the operator, or as floats where a run has many tokens; what chooses is no node."""
    (exported,) = export(checkpoint, tmp_path, [Recipe(cache="int8")])
    timed, layers = TimedPackage(exported.path, 1, "cpu"), read_package(exported.path).manifest.contract.layers

    for profile, ran, other in (
        (timed.profile_decode(0, 2), "GroupQueryAttention", "MultiHeadAttention"),
        (timed.profile_prefill(0, MANY_TOKENS), "MultiHeadAttention", "GroupQueryAttention"),
    ):
        counts = {each.operator: each.nodes for each in profile.kernels.operators}
        assert counts[ran] == layers
        assert counts.keys().isdisjoint({other, "If"})


def test_the_first_piece_does_not_count_and_the_profiler_is_taken_off() -> None:
    def node(name: str, ts: int, dur: int) -> Event:
        return {"name": f"{name}{KERNEL}", "ts": ts, "dur": dur, "args": {"op_name": name}}

    def run(ts: int, *durations: int) -> list[Event]:
        names = ("MatMul", "Reshape", "MatMul")
        nodes = [node(*each) for each in zip(names, range(ts + 1, ts + 4), durations, strict=True)]
        return [*nodes, {"name": RUN, "ts": ts, "dur": 10 + sum(durations)}]  # a run's event follows its nodes'

    events = [event for ts in (300, 0, 100, 200) for event in run(ts, *((900, 900, 900) if ts < 200 else (20, 2, 7)))]

    times = run_times(events, runs=2)

    assert [(each.operator, each.nodes, each.ms) for each in times.operators] == [
        ("MatMul", 4, pytest.approx(2 * (20 + 7 - 2 * 2) / 1e3)),
        ("Reshape", 2, 0),
    ]
    assert times.profiler_us == 2
    assert times.run_ms == pytest.approx(2 * 39 / 1e3)


@pytest.mark.parametrize(("tokens", "runs"), [(5, 1), (PREFILL_CHUNK + 1, 2)])
def test_a_prefill_has_the_nodes_of_all_its_runs(packages: Path, tokens: int, runs: int) -> None:
    timed = TimedPackage(packages / "int8-dynamic", 1, "cpu")

    profile = timed.profile_prefill(7, tokens)

    assert profile.kernels.nodes == runs * timed.profile_decode(0, 1).kernels.nodes
    assert profile.ms > 0
    parts = profile.kernels.kernels_ms + profile.between_ms + profile.python_ms
    assert parts == pytest.approx(profile.ms, abs=1e-3)


@pytest.mark.usefixtures("elsewhere")
def test_a_profile_leaves_nothing_behind(packages: Path) -> None:
    TimedPackage(packages / "float32", 1, "cpu").profile_decode(0, 2)

    assert list(Path.cwd().iterdir()) == []
