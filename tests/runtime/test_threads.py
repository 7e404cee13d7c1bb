"""How many threads are taken: of the cores that this process may use, the fast ones, within control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from expe_edge.runtime import PackageSession
from expe_edge.runtime.threads import VARIABLE, cores, default_threads, processor_quota, usable

ON_ONE = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from expe_edge.runtime import PackageSession
session = PackageSession.load(sys.argv[1])
own, tasks = os.sched_getaffinity(0), os.listdir("/proc/self/task")
print(session.threads, [os.sched_getaffinity(int(task)) == own for task in tasks])
"""


def machine(root: Path, processors: dict[int, dict[str, object]]) -> Path:
    """Write what Linux says of processors."""
    for number, files in processors.items():
        for name, value in files.items():
            file = root / f"sys/devices/system/cpu/cpu{number}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{value}\n")
    return root


def group(root: Path, path: str, files: dict[str, object]) -> None:
    """Write the files of a control group."""
    (root / path).mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (root / path / name).write_text(f"{value}\n")


def test_a_core_counts_once(tmp_path: Path) -> None:
    siblings = {number: {"topology/thread_siblings_list": f"{number % 4},{number % 4 + 4}"} for number in range(8)}
    root = machine(tmp_path, {number: dict(files) for number, files in siblings.items()})

    assert cores(range(8), root) == 4
    assert cores([1, 5], root) == 1
    assert cores([1, 2, 6], root) == 2
    assert cores([3], root) == 1


@pytest.mark.parametrize("name", ["cpu_capacity", "cpufreq/cpuinfo_max_freq"])
def test_slow_cores_of_a_hybrid_machine_get_none(tmp_path: Path, name: str) -> None:
    speeds = [1024, 1024, 980, 980, 700, 700, 400, 400]  # favoured cores are a little faster than their like
    root = machine(tmp_path, {number: {name: speed} for number, speed in enumerate(speeds)})

    assert cores(range(8), root) == 4
    assert cores(range(4, 8), root) == 2  # of those that may be used
    assert cores([6, 7], root) == 2


def test_processors_of_which_nothing_is_said(tmp_path: Path) -> None:
    assert cores(range(6), tmp_path) == 6


def test_quota_of_version_2(tmp_path: Path) -> None:
    """The narrowest of all above counts."""
    assert processor_quota(tmp_path) is None
    group(tmp_path, "proc/self", {"cgroup": "0::/outer/inner"})
    assert processor_quota(tmp_path) is None
    group(tmp_path, "sys/fs/cgroup/outer/inner", {"cpu.max": "max 100000"})
    assert processor_quota(tmp_path) is None
    group(tmp_path, "sys/fs/cgroup/outer", {"cpu.max": "150000 100000"})
    assert processor_quota(tmp_path) == 1.5
    group(tmp_path, "sys/fs/cgroup", {"cpu.max": "20000 10000"})
    assert processor_quota(tmp_path) == 1.5
    group(tmp_path, "sys/fs/cgroup/outer/inner", {"cpu.max": "nonsense"})
    assert processor_quota(tmp_path) == 1.5


def test_quota_of_version_1(tmp_path: Path) -> None:
    group(tmp_path, "proc/self", {"cgroup": "4:cpu,cpuacct:/job\n2:memory:/other\n0::/"})
    group(tmp_path, "sys/fs/cgroup/cpu/job", {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000})
    assert processor_quota(tmp_path) is None
    group(tmp_path, "sys/fs/cgroup/cpu", {"cpu.cfs_quota_us": 400000, "cpu.cfs_period_us": 100000})
    assert processor_quota(tmp_path) == 4.0


@pytest.mark.parametrize(
    ("quota", "expected"), [(None, 6), (0.2, 1), (1.0, 1), (1.4, 1), (1.5, 2), (2.5, 3), (5.9, 6), (64.0, 6)]
)
def test_the_default_is_within_the_quota(monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("expe_edge.runtime.threads.processor_quota", lambda: quota)
    monkeypatch.setattr("expe_edge.runtime.threads.cores", lambda _: 6)
    monkeypatch.setattr("expe_edge.runtime.threads.usable", lambda: list(range(12)))

    assert default_threads() == expected


def test_onnxruntime_s_own_variable(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    assert PackageSession.load(packages / "float32").threads == 1
    monkeypatch.setenv(VARIABLE, "3")
    assert default_threads() == 3
    for nothing in ("0", "", "many", "-2"):
        monkeypatch.setenv(VARIABLE, nothing)
        assert 1 <= default_threads() <= len(usable())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are not bound to processors here")
def test_a_process_on_one_processor_stays_there(packages: Path) -> None:
    """onnxruntime's default would be a thread for each physical core, bound to processors that are not ours."""
    command = [sys.executable, "-c", ON_ONE, str(packages / "float32")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)

    threads, _, bound = done.stdout.partition(" ")
    assert threads == "1"
    assert set(bound.strip("[]\n").split(", ")) == {"True"}
