"""Benchmarks of the runtime on a small package: what they print, and that a window's memory does not grow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def lines(module: str, *arguments: object) -> list[dict[str, Any]]:
    """Run a benchmark in a process of its own and return the JSON lines it prints."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what is resident")
def test_a_window_s_memory_does_not_grow(packages: Path) -> None:
    *parts, change = lines(
        "window_stream",
        *(packages / "float32", "--tokens", 24_000, "--part", 2000, "--window", 64, "--decoded", 10),
    )

    assert len(parts) == 12
    assert parts[-1]["tokens"] == 12 * (2000 + 9)
    grown = parts[-1]["resident_bytes"] - parts[1]["resident_bytes"]
    whole_cache = 22_000 * 2 * 2 * 2 * 16 * 4  # what tokens since then would take without a window
    assert grown < whole_cache / 4
    assert abs(change["quartiles of the change"]["resident"][1]) < 0.02


def test_prompt_lookup_is_compared_with_decoding_without(packages: Path) -> None:
    module, quartiles = lines(
        "prompt_lookup",
        packages / "float32",
        "--module",
        "bisect",
        "--prompt-tokens",
        200,
        "--tokens",
        60,
        "--turns",
        1,
    )
    assert module["same_tokens"]
    assert 0 <= module["accepted"] <= module["drafted"]
    assert quartiles["ratio"][1] == pytest.approx(module["ratio"], abs=0.01)


def test_prefill_chunks_are_timed_by_depth(packages: Path) -> None:
    (shallow, deep) = lines(
        *("prefill_chunks", packages / "float32", "--depth", 100, "--depth", 70_000),
        *("--chunk", 16, "--chunk", 64, "--turns", 1),
    )
    assert (shallow["chosen"], deep["chosen"]) == (256, 64)
    assert set(shallow["milliseconds"]) == {"16", "64"}


def test_startup_is_measured_in_every_way(packages: Path) -> None:
    *imports, last = lines("startup", packages / "float32", "--turns", 1, "--threads", 1)

    assert [each["way"] for each in (*imports, last)] == [
        *("import of libraries", "import of ours", "hashes", "onnxruntime alone"),
        *("load", "load, keeping", "load, kept", "generator, kept"),
    ]
    assert all(each["milliseconds"][1] > 0 for each in (*imports, last))
