"""`benchmarks.chaos` sees what a kill leaves: a command that writes in place is lost, one that takes care is not."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from benchmarks import chaos
from benchmarks.chaos import Chaos, LostError, Moment, Scenario

WHOLE = "whole" * 1000


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True)
def in_place(out: Path, force: bool) -> None:
    """Write a file in two halves."""
    del force
    out.write_text(WHOLE[:100], encoding="utf-8")
    with out.open("a", encoding="utf-8") as file:
        file.write(WHOLE[100:])


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True)
def beside(out: Path, force: bool) -> None:
    """Write a file beside its place."""
    del force
    partial = out.with_name("partial")
    partial.write_text(WHOLE, encoding="utf-8")
    partial.rename(out)


def identities(place: Path) -> dict[str, str]:
    out = place / "out"
    return {"out": out.read_text(encoding="utf-8")} if out.exists() else {}


def outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., object], change: int) -> str | None:
    """Kill a command before a change to files; return what is lost."""
    monkeypatch.setattr(chaos, "command_line", command)
    monkeypatch.setattr(chaos, "draw_moment", lambda *_: Moment(signal.SIGKILL, change=change))
    found = Chaos(tmp_path)
    found.scenarios = [
        Scenario("planted", lambda place: [str(place / "out")], lambda _: None, identities, chaos.write_again)
    ]
    lost: str | None = found.kill(0, 0)["lost"]
    return lost


def test_a_command_that_writes_in_place_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome(tmp_path, monkeypatch, in_place, 1) is None  # before it has begun
    assert outcome(tmp_path, monkeypatch, in_place, 2) == "LostError: out is neither the old one nor the new one"


@pytest.mark.parametrize("change", [1, 2])
def test_one_that_writes_beside_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: int) -> None:
    assert outcome(tmp_path, monkeypatch, beside, change) is None


@click.command()
def deaf() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(60)


def test_a_command_that_does_not_obey_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos, "command_line", deaf)
    monkeypatch.setattr(chaos, "PROMPT", 0.5)
    with pytest.raises(LostError, match=r"still running after 0\.5 seconds"):
        chaos.run([], tmp_path / "stderr", Moment(signal.SIGINT, seconds=0.5))
