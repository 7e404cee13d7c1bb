"""Where a step's time goes: onnxruntime's profile, grouped by operator."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort

from expe_edge.results import Result
from expe_edge.runtime.opening import session_options
from expe_edge.runtime.session import PackageSession

Value = TypeVar("Value")
Event = Mapping[str, Any]

#: How onnxruntime ends the name of a node's event, and names a run's.
KERNEL, RUN = "_kernel_time", "model_run"


@dataclass(frozen=True)
class OperatorTime(Result):
    """All nodes of one operator in a piece of work. ms: of its kernels, together."""

    operator: str
    nodes: int
    ms: float


@dataclass(frozen=True)
class RunTimes(Result):
    """What onnxruntime's profiler says of a piece of work of one run or several; medians over repetitions.

    operators: the slowest first. profiler_us: what the profiler adds to every node, taken off the operators' times.
    run_ms: from the beginning of a run to its end, summed over runs, with all that the profiler adds.
    """

    operators: tuple[OperatorTime, ...]
    profiler_us: float
    run_ms: float

    @property
    def nodes(self) -> int:
        """Nodes that have been run, of all operators."""
        return sum(operator.nodes for operator in self.operators)

    @property
    def kernels_ms(self) -> float:
        """Time of all kernels."""
        return sum(operator.ms for operator in self.operators)


def profiled(
    session: PackageSession, threads: int | None, work: Callable[[PackageSession], Value]
) -> tuple[Value, list[Event]]:
    """Return what `work` makes of a copy of the session that is profiled, and the events of the profile.

    Args:
        threads: what `session` was loaded with.
    """
    with tempfile.TemporaryDirectory() as directory:
        plans = session.session.get_session_options().enable_mem_pattern
        options = session_options(threads, session.kernels, plans=plans)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(directory, "profile"))
        watched = copy.copy(session)
        providers = session.session.get_providers()
        watched.session = ort.InferenceSession(str(session.package.model_path), options, providers=providers)
        value = work(watched)
        return value, json.loads(Path(watched.session.end_profiling()).read_text(encoding="utf-8"))


def _is_kernel(event: Event) -> bool:
    """Say whether an event is a node's; one that chooses a branch takes the time of the nodes in it, which are told."""
    return bool(event["name"].endswith(KERNEL)) and event["args"]["op_name"] != "If"


def run_times(events: Sequence[Event], runs: int) -> RunTimes:
    """Group the events of a profile by operator.

    The profiler describes a node's inputs and outputs before it stops the clock: of a small node that is most of the
    time. What the fastest node takes, one that moves nothing such as Reshape, is taken for the profiler's and taken
    off every node.

    Args:
        runs: of a piece of work. The profile holds several pieces, all of the same nodes; the first warms up and does
            not count.
    """
    spans = sorted((event["ts"], event["dur"]) for event in events if event["name"] == RUN)
    kernels = sorted((event for event in events if _is_kernel(event)), key=itemgetter("ts"))
    pieces = len(spans) // runs
    names = np.array([kernel["args"]["op_name"] for kernel in kernels[: len(kernels) // pieces]])
    times = np.array([kernel["dur"] for kernel in kernels], dtype=np.float64).reshape(pieces, -1)[1:]  # microseconds
    own = float(times.mean(axis=0).min())
    operators = []
    for name in dict.fromkeys(names.tolist()):
        of = times[:, names == name]
        spent = float(np.median((of - own).sum(axis=1)))
        operators.append(OperatorTime(name, of.shape[1], round(max(spent, 0.0) / 1e3, 4)))
    operators.sort(key=lambda operator: -operator.ms)
    durations = np.array([duration for _, duration in spans]).reshape(pieces, runs)[1:].sum(axis=1)
    return RunTimes(tuple(operators), round(own, 2), float(np.median(durations)) / 1e3)
