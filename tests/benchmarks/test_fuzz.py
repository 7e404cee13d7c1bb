"""`benchmarks.fuzz` finds what it is for: faults that are put in, each by its name, with exit code 1."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.fuzz import __main__ as fuzz
from benchmarks.fuzz.trial import Materials, Trial
from expe_edge.errors import PackageError
from tests.small import command_runner

PLANTED: dict[str, tuple[Callable[[Trial], object], str]] = {
    "another exception": (lambda _: json.loads("{}")["x"], "KeyError"),
    "a hang": (lambda _: time.sleep(60), "hang"),
    "a crash": (lambda _: os.kill(os.getpid(), signal.SIGKILL), "crash -9"),
    "memory": (lambda _: bytearray(2**31), "MemoryError"),
}


def refuse(message: str) -> Callable[[Trial], object]:
    def target(_: Trial) -> None:
        raise PackageError(message)

    return target


def found(tmp_path: Path, target: Callable[[Trial], object], cases: int = 2) -> list[fuzz.Outcome]:
    return list(fuzz.fuzz(0, range(cases), 60, Materials(tmp_path), {"planted": target}))


@pytest.mark.parametrize("planted", PLANTED)
def test_a_fault_is_found_and_the_next_case_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    monkeypatch.setattr(fuzz, "LONGEST", 1.0)
    target, name = PLANTED[planted]

    outcomes = found(tmp_path, target)

    assert [(outcome.case, outcome.end, outcome.lost) for outcome in outcomes] == [(0, name, True), (1, name, True)]


def test_used_and_refused_are_no_loss(tmp_path: Path) -> None:
    assert [outcome.end for outcome in found(tmp_path, lambda _: None)] == [fuzz.USED] * 2
    assert [outcome.end for outcome in found(tmp_path, refuse("one line"))] == [fuzz.REFUSED] * 2
    assert [outcome.end for outcome in found(tmp_path, refuse("x" * 20_000))] == ["message"] * 2


def test_a_case_is_a_function_of_its_seed_and_number(tmp_path: Path) -> None:
    drawn: list[float] = []
    for case in (7, 7, 8):
        targets = {"planted": lambda trial: drawn.append(trial.random.random())}
        fuzz.run_case(0, case, Materials(tmp_path), tmp_path, targets)

    assert drawn[0] == drawn[1] != drawn[2]


def broken(_: Trial) -> None:
    raise KeyError("x")


@pytest.mark.parametrize(("target", "code"), [(broken, 1), (lambda _: None, 0)])
def test_the_command_reports_and_ends_by_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Callable[[Trial], None], code: int
) -> None:
    monkeypatch.setattr(fuzz, "TARGETS", {"planted": target})
    monkeypatch.setattr(Materials, "make", lambda root: Materials(root))
    result = command_runner().invoke(fuzz.main, ["--cases", "3", "--json", str(tmp_path / "result.json")])
    written = json.loads((tmp_path / "result.json").read_text())

    assert result.exit_code == code, result.output
    assert (written["tried"], written["lost"]) == (3, 3 * code)
    assert result.stdout.endswith(f"{3 * code} lost ({code} kinds)\n")
    assert ("python -m benchmarks.fuzz --seed 0 --case 0" in result.stdout) == bool(code)
