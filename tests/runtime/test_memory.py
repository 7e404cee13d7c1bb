"""The memory plan against what a process takes, and refusals of what cannot fit."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from expe_edge.errors import GenerationError
from expe_edge.package.directory import Package, read_package
from expe_edge.package.reference import reference_package
from expe_edge.runtime import Generator
from expe_edge.runtime.kernels import Kernels
from expe_edge.runtime.memory import (
    LEAST_CHUNK,
    MOST_SCORES,
    PREFILL_CHUNK,
    available_memory,
    bounded_chunk,
    held_bytes,
    most_tokens,
    plan_memory,
)
from tests.conftest import PRECISIONS, needs_int8_cache

STATUS = Path("/proc/self/status")
#: Reads a text of as many tokens, with kernels or `off`, and prints the most that was resident, in bytes.
READING = """
import sys
from expe_edge.package.reference import reference_package
from expe_edge.runtime import Generator
generator = Generator.load(sys.argv[1], threads=1, kernels=sys.argv[3])
generator.context([token % 200 for token in range(int(sys.argv[2]))])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024)
"""


def peak_of(package: Path, tokens: int, kernels: str) -> int:
    """Return the peak of a process that does nothing else."""
    command = [sys.executable, "-c", READING, str(package), str(tokens), kernels]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)


says_what_is_resident = pytest.mark.skipif(not STATUS.exists(), reason="the system does not say what is resident")


@says_what_is_resident
def test_the_plan_is_what_a_process_takes(cached_generator: Generator) -> None:
    require_planned(cached_generator.session.package)


@needs_int8_cache
@says_what_is_resident
def test_the_plan_counts_the_floats_that_an_int8_cache_is_read_as(int8_cache_generator: Generator) -> None:
    require_planned(int8_cache_generator.session.package)


@needs_int8_cache
@says_what_is_resident
def test_with_kernels_of_our_own_it_counts_none(int8_cache_generator: Generator, kernels: Kernels) -> None:
    require_planned(int8_cache_generator.session.package, kernels)


def require_planned(package: Package, kernels: Kernels | None = None) -> None:
    """In all, and in what a longer text adds to it, of which nothing is the runtime's or the weights'."""
    own, where = kernels is not None, str(kernels.directory) if kernels else "off"
    short, long = (plan_memory(package, tokens, own_kernels=own) for tokens in (512, 8192))
    least, most = (peak_of(package.path, plan.tokens, where) for plan in (short, long))

    assert 0.7 < short.peak / least < 1.4
    assert 0.7 < long.peak / most < 1.4
    assert 0.6 < (long.peak - short.peak) / (most - least) < 1.6


def test_weights_are_held_as_the_kernels_want_them(packages: Path) -> None:
    """Once, in float32 where they are computed with in it; 4 bits with sums beside."""
    held = {name: held_bytes(read_package(packages / name).manifest) for name in PRECISIONS}
    stored = {name: (packages / name / "model.onnx").stat().st_size for name in PRECISIONS}

    assert held["float32"] == stored["float32"]
    assert held["int8-dynamic"] == stored["int8-dynamic"]
    assert held["float16"] == pytest.approx(held["float32"], rel=0.05)
    assert held["bfloat16"] == pytest.approx(held["float32"], rel=0.05)
    assert stored["int4-weight"] < held["int4-weight"] < 1.5 * stored["int4-weight"]


def test_kernels_of_our_own_copy_their_weights(packages: Path) -> None:
    manifest = read_package(packages / "int4-weight").manifest
    of_blocks = sum(part["bytes"] for part in manifest.parts if part["format"] == "int4-weight")

    assert held_bytes(manifest, own_kernels=True) - held_bytes(manifest) == pytest.approx(of_blocks / 2, abs=1)
    dynamic = read_package(packages / "int8-dynamic").manifest
    assert held_bytes(dynamic, own_kernels=True) == held_bytes(dynamic)


def test_a_short_context_s_peak_is_that_of_opening() -> None:
    plan = plan_memory(read_package(reference_package()), 1)

    assert plan.needed < plan.weights // 2
    assert plan.peak == plan.runtime + int(1.5 * plan.weights)


#: Leaves 64 MB of small pieces free below one that is still used, then gives them back; prints what is resident before
#: and after, in bytes.
LEAVING = """
from expe_edge.runtime.opening import give_back
from expe_edge.speed.measuring import resident_bytes
pieces = [bytes(4096) for _ in range(16384)]
last = bytes(4096)
pieces.clear()
before = resident_bytes()
give_back()
print(before, resident_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library gives back by itself, or never")
def test_what_opening_leaves_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, check=True, timeout=120)

    before, after = map(int, done.stdout.split())
    assert before - after > 40_000_000


@pytest.mark.parametrize("heads", [1, 6, 12, 128])
def test_chunks_are_chosen_so_that_the_bias_stays_bounded(heads: int) -> None:
    chunks = {depth: bounded_chunk(heads, depth) for depth in (0, 1000, 4096, 65_536, 10**6, 2**24 - 1)}

    assert chunks[0] == PREFILL_CHUNK
    assert list(chunks.values()) == sorted(chunks.values(), reverse=True)
    for depth, chunk in chunks.items():
        assert chunk % LEAST_CHUNK == 0
        assert chunk == LEAST_CHUNK or heads * chunk * (depth + chunk) <= MOST_SCORES
        assert chunk == PREFILL_CHUNK or heads * 2 * chunk * (depth + PREFILL_CHUNK) > MOST_SCORES


def test_prefill_takes_these_chunks(generator: Generator, monkeypatch: pytest.MonkeyPatch, text: list[int]) -> None:
    monkeypatch.setattr("expe_edge.runtime.memory.MOST_SCORES", 2**17)  # of 4 heads: 256 × 128, 128 × 256, …
    context = generator.context(text)
    chunks = [len(part) for part in generator.session.prefill(generator.session.new_cache(1, 600), context.tokens)]

    assert chunks == [128, *[LEAST_CHUNK] * 7, 24]


def test_most_tokens_is_the_last_that_fits(packages: Path) -> None:
    package = read_package(packages / "float32")
    for memory in (10**6, 10**8, 10**9):
        fitting = most_tokens(package, memory, limit=2**24)
        assert plan_memory(package, fitting).needed <= memory < plan_memory(package, fitting + 1).needed
    assert most_tokens(package, 10**15, limit=5000) == 5000
    assert most_tokens(package, 0, limit=5000) == 0


# What there is


def group(root: Path, path: str, files: dict[str, object]) -> None:
    """Write the files of a control group."""
    directory = root / path
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (directory / name).write_text(f"{value}\n")


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """A system with 1,000,000 kB free and no control groups."""
    group(tmp_path, "proc", {"meminfo": "MemTotal: 2000000 kB\nMemAvailable: 1000000 kB\nHugePages_Total: 0"})
    return tmp_path


def test_memory_of_a_machine(system: Path) -> None:
    assert available_memory(system) == 1_024_000_000
    assert available_memory(system / "nowhere") is None
    if STATUS.exists():
        free = available_memory()
        assert free is not None
        assert free > 10**6


def test_memory_of_control_groups_of_version_2(system: Path) -> None:
    """The narrowest of all above counts; pages of files are given back, and `max` is no limit."""
    group(system, "proc/self", {"cgroup": "0::/outer/inner"})
    group(system, "sys/fs/cgroup/outer/inner", {"memory.max": "max", "memory.current": 5})
    assert available_memory(system) == 1_024_000_000

    group(system, "sys/fs/cgroup/outer", {"memory.max": 900, "memory.current": 700, "memory.stat": "inactive_file 100"})
    assert available_memory(system) == 300

    group(system, "sys/fs/cgroup/outer/inner", {"memory.max": 50})
    assert available_memory(system) == 45

    group(system, "sys/fs/cgroup/outer/inner", {"memory.max": 4})
    assert available_memory(system) == 0


def test_memory_of_control_groups_of_version_1(system: Path) -> None:
    group(system, "proc/self", {"cgroup": "4:cpu,memory:/job\n1:name=systemd:/\n0::/"})
    usage = {"memory.limit_in_bytes": 2**20, "memory.usage_in_bytes": 2**19, "memory.stat": "total_inactive_file 5"}
    group(system, "sys/fs/cgroup/memory/job", usage)
    group(system, "sys/fs/cgroup/memory", {"memory.limit_in_bytes": 2**63 - 4096, "memory.usage_in_bytes": 2**19})

    assert available_memory(system) == 2**19 + 5


def test_groups_that_only_the_outside_knows(system: Path) -> None:
    """In a container the path is that of the host, and the files are those at the top."""
    group(system, "proc/self", {"cgroup": "0::/host/only"})
    group(system, "sys/fs/cgroup", {"memory.max": 1000, "memory.current": 100})

    assert available_memory(system) == 900


# Refusals


def test_what_cannot_fit_is_refused_before_anything_is_taken(
    cached_generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, portable = cached_generator, cached_generator.session.contract.growing_cache
    monkeypatch.setattr("expe_edge.runtime.memory.available_memory", lambda: 40_000_000)
    fitting = most_tokens(generator.session.package, 40_000_000, limit=10**6)

    with pytest.raises(GenerationError) as caught:
        generator.stream("the", max_new_tokens=10**6)
    message = str(caught.value)
    assert message.startswith("1 × 1,000,")
    assert " of keys and values and " in message
    assert " to read them, but 40" in message
    found = int(message.partition("at most ")[2].partition(" tokens fit")[0].replace(",", ""))
    assert abs(found - fitting) < 1000  # what the new cache has taken is counted as free
    assert ("or export a package with `cache` int8" in message) is not portable
    assert "give a `window`" in message

    generator.stream("the", max_new_tokens=fitting - 300)
    with pytest.raises(GenerationError, match="lower `batch_size`"):
        generator.generate(["the"] * 50, max_new_tokens=fitting - 300, batch_size=50)
    with pytest.raises(GenerationError, match="tokens fit"):
        generator.context([5] * (fitting + 1000))
