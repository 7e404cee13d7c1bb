"""Going on with a run: the same sequences, from the newest whole checkpoint, by the settings that are given."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from expe_edge.errors import CheckpointError, ConfigError
from expe_edge.training import callbacks
from expe_edge.training.checkpoint import load_checkpoint
from expe_edge.training.record import last_checkpoint
from expe_edge.training.run import train
from tests.command_line import lines_until, names, on_two_processes, start_two_processes
from tests.small import small_settings

STEPS, EVERY = 8, 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """A run of eight steps with checkpoints at four and eight."""
    run = tmp_path_factory.mktemp("resuming") / "run"
    train(settings(text_folder), run)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def settings(text_folder: Path, **changes: Any) -> Any:
    small = small_settings(text_folder, max_steps=STEPS, save_every=EVERY, log_every=1)
    return dataclasses.replace(small, **changes)


def rates(report: dict[str, Any]) -> dict[int, float]:
    return {entry["step"]: entry["learning_rate"] for entry in report["history"]}


def losses(report: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in report["history"]]


@pytest.mark.parametrize(
    "state", ["[]", "{}", '{"global_step": {}}', '{"global_step": -1}', '{"x": 1}', "[" * 5000, '{"log_history": 5}']
)
def test_a_state_that_is_none_is_damage(run: Path, state: str) -> None:
    (run / "trainer" / "checkpoint-8" / "trainer_state.json").write_text(state, encoding="utf-8")

    last, damaged = last_checkpoint(run)

    assert last.name == "checkpoint-4"
    assert "trainer_state.json is missing or damaged" in damaged[0]


# What a kill leaves.


def test_a_run_killed_while_its_weights_are_put_in_place_is_unfinished_and_resumed(
    run: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "model.safetensors").read_bytes()
    replace = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if path.name == "training.json":
            raise SystemExit
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as SIGKILL, which lets nothing be cleared up
        with pytest.raises(SystemExit):
            train(settings(text_folder), run, resume=True)
    with pytest.raises(CheckpointError, match=r"no model.safetensors in it, so not a finished checkpoint"):
        load_checkpoint(run)

    train(settings(text_folder), run, resume=True)
    assert (run / "model.safetensors").read_bytes() == before
    assert ".finished" not in names(run)


# By the settings that are given.


def test_a_longer_run_follows_the_schedule_of_its_whole_length(run: Path, tmp_path: Path, text_folder: Path) -> None:
    longer = settings(text_folder, max_steps=2 * STEPS)
    resumed, whole = train(longer, run, resume=True), train(longer, tmp_path / "whole")

    for step in range(STEPS + 1, 2 * STEPS + 1):
        assert rates(resumed)[step] == pytest.approx(rates(whole)[step])
        assert rates(resumed)[step] > 0 or step == 2 * STEPS


def test_rate_and_decay_are_those_that_are_given(run: Path, text_folder: Path) -> None:
    shutil.rmtree(run / "trainer" / f"checkpoint-{STEPS}")
    before = json.loads((run / "training.json").read_text())
    changed = settings(text_folder, learning_rate=1e-5, weight_decay=0.0)
    resumed = train(changed, run, resume=True)

    ratio = 1e-5 / settings(text_folder).learning_rate
    for step in range(EVERY + 2, STEPS + 1):
        assert rates(resumed)[step] == pytest.approx(ratio * rates(before)[step])
    state = torch.load(run / "trainer" / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.0, 0.0]
    assert resumed["settings"]["learning_rate"] == 1e-5


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 16}, {"seed": 5}, {"position_offset": 5}, {"text_field": "body"}, {"data": ("python-stdlib",)}],
)
def test_what_changes_the_sequences_is_refused_by_name(run: Path, text_folder: Path, change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ConfigError, match=rf"^{name} is .*, but .* in the run of .*; drop the option, or `resume`$"):
        train(settings(text_folder, max_steps=2 * STEPS, **change), run, resume=True)


def test_text_that_has_changed_is_refused(tmp_path: Path, text_folder: Path) -> None:
    texts = Path(shutil.copytree(text_folder, tmp_path / "texts"))
    train(settings(texts), tmp_path / "run")
    for file in texts.iterdir():
        file.write_text(file.read_text() + " more", encoding="utf-8")

    with pytest.raises(
        ConfigError, match=r"the text of .* has changed since its run began; bring it back, or start anew"
    ):
        train(settings(texts, max_steps=2 * STEPS), tmp_path / "run", resume=True)


def test_fewer_steps_than_are_done_are_refused(run: Path, text_folder: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^max_steps is 2, but the run of .* has done {STEPS}; raise `max_steps`$"):
        train(settings(text_folder, max_steps=2), run, resume=True)


# From the newest whole checkpoint.


def cut(name: str) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:-40])


def emptied(name: str) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / name).write_bytes(b"")


def removed(name: str) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / name).unlink()


def every_damage() -> Iterator[Any]:
    for name in ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        for damage in (cut, emptied, removed):
            yield pytest.param(name, damage(name), id=f"{name}-{damage.__name__}")


@pytest.mark.parametrize(("name", "damage"), list(every_damage()))
def test_a_damaged_checkpoint_is_passed_over_and_named(
    run: Path, text_folder: Path, name: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((run / "training.json").read_text())
    damage(run / "trainer" / f"checkpoint-{STEPS}")
    (run / "trainer" / "checkpoint-9").mkdir()
    resumed = train(settings(text_folder), run, resume=True)

    assert losses(resumed) == losses(before)
    lines = capsys.readouterr().err.splitlines()
    assert any("checkpoint-9: trainer_state.json is missing or damaged" in line for line in lines)
    assert any(
        f"checkpoint-{STEPS}: {name} is missing or damaged; going on from the checkpoint before" in line
        for line in lines
    )


def test_no_whole_checkpoint(run: Path, text_folder: Path) -> None:
    for step in (EVERY, STEPS):
        (run / "trainer" / f"checkpoint-{step}" / "optimizer.pt").unlink()

    with pytest.raises(CheckpointError, match=r"no checkpoint to resume from \(optimizer.pt is missing or damaged\)"):
        train(settings(text_folder), run, resume=True)


# On another number of processes.


def test_a_run_goes_on_with_the_same_batches_on_another_number_of_processes(
    run: Path, tmp_path: Path, text_folder: Path
) -> None:
    """From one process to two, and back to one."""
    alone = Path(shutil.copytree(run, tmp_path / "alone"))
    on_two_processes("train", "--resume", "--out", run, "--max-steps", STEPS + 4)
    assert json.loads((run / "training.json").read_text())["processes"] == 2

    for steps in (STEPS + 4, STEPS + 8):
        expected = train(settings(text_folder, max_steps=steps), alone, resume=True)
        found = train(settings(text_folder, max_steps=steps), run, resume=True)
        np.testing.assert_allclose(losses(found), losses(expected), rtol=5e-4)


def test_ctrl_c_that_reaches_one_of_two_processes_stops_both_behind_a_checkpoint(
    tmp_path: Path, text_folder: Path
) -> None:
    run, config = tmp_path / "run", tmp_path / "settings.yaml"
    asked = settings(text_folder, max_steps=4000, save_every=100000, log_every=20)
    given = {name: value for name, value in dataclasses.asdict(asked).items() if value is not None}
    config.write_text(json.dumps(given), encoding="utf-8")
    process = start_two_processes("train", "--config", config, "--out", run)
    said = list(lines_until(process.stderr, "step 400/4000"))
    assert "step 400/4000" in said[-1], said

    last = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1]
    os.kill(int(last), signal.SIGINT)
    process.communicate(timeout=120)

    assert process.returncode != 0
    (saved,) = (run / "trainer").glob("checkpoint-*")
    step = int(saved.name.removeprefix("checkpoint-"))
    report = train(settings(text_folder, max_steps=step + 1, save_every=100000, log_every=1), run, resume=True)
    assert report["history"][-1]["step"] == step + 1


def test_ctrl_c_while_processes_ask_one_another_is_not_lost(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def ask(flag: bool, _: torch.device) -> bool:
        asked.append(flag)
        if len(asked) == 1:
            signal.raise_signal(signal.SIGINT)
        return flag

    monkeypatch.setattr(callbacks, "in_any_process", ask)
    with pytest.raises(KeyboardInterrupt):
        train(settings(text_folder), tmp_path / "run")

    assert asked == [False, True]
    assert names(tmp_path / "run" / "trainer") == ["checkpoint-2"]


# Divergence.


def test_a_run_that_diverges_ends_in_one_line_and_keeps_what_was_good(tmp_path: Path, text_folder: Path) -> None:
    train(settings(text_folder, max_steps=EVERY), tmp_path / "run")
    good = load_file(tmp_path / "run" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"^training diverged after step \d+: .*; lower `learning_rate`, 1e\+30 now"):
        train(settings(text_folder, learning_rate=1e30, warmup_steps=0), tmp_path / "run", resume=True)

    kept = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(good[name], kept[name]) for name in good)
    for checkpoint in (tmp_path / "run" / "trainer").glob("checkpoint-*"):
        assert all(weight.isfinite().all() for weight in load_file(checkpoint / "model.safetensors").values())


def test_losses_that_are_not_finite_are_not_shown_as_zero(tmp_path: Path, text_folder: Path) -> None:
    with pytest.raises(ConfigError, match="training diverged after step"):
        train(settings(text_folder, learning_rate=1e30, warmup_steps=0), tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert not list((tmp_path / "run" / "trainer").glob("checkpoint-*"))
