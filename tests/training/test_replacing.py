"""Replacing a run: nothing is lost before the new one is complete."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from expe_edge.errors import CheckpointError, ConfigError
from expe_edge.training import run as running
from expe_edge.training.replacing import set_aside
from expe_edge.training.run import train
from expe_edge.training.settings import TrainSettings
from tests.command_line import QUICK, names, refused, succeed, tree, write_text
from tests.small import small_settings


@pytest.fixture
def old(tmp_path: Path, text_folder: Path) -> Path:
    """A complete run of one step, by seed 0."""
    train(small_settings(text_folder, max_steps=1, save_every=1), tmp_path / "run")
    return tmp_path / "run"


def seed_of(run: Path) -> int:
    return int(json.loads((run / "training.json").read_text())["settings"]["seed"])


def other(text_folder: Path) -> TrainSettings:
    return small_settings(text_folder, seed=1, max_steps=2, save_every=1)


def test_the_new_run_takes_the_place(old: Path, text_folder: Path) -> None:
    train(other(text_folder), old, force=True)

    assert seed_of(old) == 1
    assert names(old.parent) == ["run"]


def fail(*_: object) -> None:
    raise CheckpointError("as if the disk were full")


def test_a_run_that_never_began_brings_the_old_one_back(
    old: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(old)
    monkeypatch.setattr(running, "_make_models", fail)
    with pytest.raises(CheckpointError, match="as if the disk were full"):
        train(other(text_folder), old, force=True)

    assert tree(old) == before
    assert names(old.parent) == ["run"]


def test_a_run_that_can_be_resumed_stays_and_the_old_one_beside_it(
    old: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(running, "_finish", fail)
        with pytest.raises(CheckpointError, match="as if the disk were full"):
            train(other(text_folder), old, force=True)
    kept = old.parent / ".run-before"
    assert (seed_of(old), seed_of(kept)) == (1, 0)
    assert (kept / "model.safetensors").exists()
    assert f"{kept} is the run before, until `resume` completes this one" in capsys.readouterr().err.replace("\n", "")

    train(other(text_folder), old, resume=True)
    assert names(old.parent) == ["run"]
    assert seed_of(old) == 1


def test_of_two_interrupted_runs_the_complete_one_before_is_kept(
    old: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_finish", fail)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="as if the disk were full"):
            train(other(text_folder), old, force=True)

    assert seed_of(old.parent / ".run-before") == 0


def test_a_linked_folder_is_replaced_where_it_is(old: Path, text_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(old)
    train(other(text_folder), tmp_path / "link", force=True)

    assert (tmp_path / "link").is_symlink()
    assert seed_of(old) == 1
    assert names(tmp_path) == ["link", "run"]


def test_an_empty_folder_is_used_as_it_is(tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(small_settings(text_folder, max_steps=1), Path())

    assert (tmp_path / "model.safetensors").exists()


def test_what_cannot_be_moved_is_refused_and_kept(
    old: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a mount point cannot, which only root could make here."""

    def busy(*_: object) -> None:
        raise OSError(16, "Device or resource busy")

    before = tree(old)
    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(ConfigError, match=r"run cannot be replaced \(Device or resource busy\); choose another `out`$"):
        train(other(text_folder), old, force=True)
    assert tree(old) == before


def test_the_current_folder_is_refused_and_kept(old: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(old)
    before = tree(old)
    with pytest.raises(ConfigError, match="holds the current directory; use `force` from elsewhere"):
        train(other(text_folder), Path(), force=True)
    assert tree(old) == before


@pytest.mark.usefixtures("elsewhere")
def test_texts_and_settings_inside_are_refused_and_kept(old: Path, text_folder: Path) -> None:
    texts = shutil.copytree(text_folder, old / "texts")
    (old / "config.yaml").write_text("max_steps: 1\n", encoding="utf-8")

    assert refused("train", "--data", texts, *QUICK, "--max-steps", 1, "--out", old, "--force") == (
        f"--data {texts} lies in {old}, which --force replaces; choose another --out"
    )
    assert refused("train", "--config", old / "config.yaml", "--out", old, "--force") == (
        f"--config {old / 'config.yaml'} lies in {old}, which --force replaces; choose another --out"
    )
    write_text("config.yaml", "max_steps: 1\n")
    succeed("train", "--data", text_folder, "--config", "config.yaml", *QUICK, "--out", old, "--force")


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_make_models", fail)
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "run", tmp_path / "empty"):
        with pytest.raises(CheckpointError, match="as if the disk were full"):
            train(small_settings(text_folder, max_steps=1), out)

    assert names(tmp_path) == ["empty"]
    assert names(tmp_path / "empty") == []


def test_a_run_killed_before_its_tokenizer_is_written_can_be_replaced(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(running, "save_tokenizer", fail)
        patch.setattr(running, "kept_until_complete", lambda _: nullcontext())  # as SIGKILL
        with pytest.raises(CheckpointError, match="as if the disk were full"):
            train(small_settings(text_folder, max_steps=1), out)
    assert names(out) == ["training.json"]

    train(small_settings(text_folder, max_steps=1), out, force=True)
    assert (out / "model.safetensors").exists()


def test_a_run_moved_aside_by_one_that_was_killed_at_once_is_brought_back(old: Path, text_folder: Path) -> None:
    set_aside(old)

    with pytest.raises(ConfigError, match="exists; use `force` to replace it"):
        train(other(text_folder), old)
    assert seed_of(old) == 0
    assert names(old.parent) == ["run"]


def test_half_a_run_that_was_being_deleted_is_never_at_its_place(
    old: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if killed each time before anything is deleted
        train(other(text_folder), old, force=True)
    assert names(old.parent) == [".run-discarded", "run"]

    train(other(text_folder), old, force=True)
    assert names(old.parent) == ["run"]


def test_what_memory_has_no_room_for_is_said(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4398046511104 bytes.")

    monkeypatch.setattr(running, "_make_models", too_large)
    with pytest.raises(ConfigError, match=r"^no memory for this model and batch; lower `batch_size`"):
        train(small_settings(text_folder, max_steps=1), tmp_path / "run")
    assert names(tmp_path) == []
