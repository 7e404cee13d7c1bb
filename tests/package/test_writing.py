"""Writing a package: complete or absent, whatever goes wrong meanwhile."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from expe_edge.errors import ExportError
from expe_edge.package import directory as package_directory
from expe_edge.package.directory import clear_leftovers, read_package, seal_package, write_package
from expe_edge.package.manifest import MANIFEST_FILE


def write_whole(path: Path, text: str, *, force: bool = False) -> None:
    """Write a directory of two files through `write_package`."""
    with write_package(path, force=force) as directory:
        (directory / "a").write_text(text, encoding="utf-8")
        (directory / MANIFEST_FILE).write_text(text, encoding="utf-8")


def content(path: Path) -> dict[str, str]:
    """Name to text of every file below `path`, hidden ones too."""
    return {str(file.relative_to(path)): file.read_text() for file in sorted(path.rglob("*")) if file.is_file()}


def interrupt(_: Path) -> None:
    """A real Ctrl-C, also where the shell that started the tests ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, previous)


def fill_the_disk(directory: Path) -> None:
    """Write to the device that is always full."""
    (directory / "b").symlink_to("/dev/full")
    (directory / "b").write_text("more", encoding="utf-8")


def raise_error(_: Path) -> None:
    raise ZeroDivisionError


#: What goes wrong while a package is being filled, and what the caller sees of it.
FAILURES: list[tuple[Callable[[Path], None], type[BaseException]]] = [
    (raise_error, ZeroDivisionError),
    (interrupt, KeyboardInterrupt),
    (fill_the_disk, ExportError),
    (lambda directory: (directory / "missing" / "file").touch(), FileNotFoundError),
]
failures = pytest.mark.parametrize(("fail", "seen"), FAILURES, ids=["error", "Ctrl-C", "disk full", "OSError"])


def test_package_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "package"
    with write_package(path) as directory:
        (directory / "a").write_text("1", encoding="utf-8")
        assert not path.exists()
        assert directory.parent == path.parent  # so that the rename cannot cross devices

    assert content(tmp_path) == {"deep/er/package/a": "1"}
    assert [entry.name for entry in path.parent.iterdir()] == ["package"]


@pytest.mark.parametrize(
    ("umask", "modes"), [(0o022, (0o755, 0o644)), (0o077, (0o700, 0o600)), (0o002, (0o775, 0o664))]
)
def test_who_may_read_a_package_is_for_the_umask_to_say(tmp_path: Path, umask: int, modes: tuple[int, int]) -> None:
    before = os.umask(umask)
    try:
        with write_package(tmp_path / "package") as directory:
            (directory / "a").write_text("1", encoding="utf-8")
    finally:
        os.umask(before)

    assert tuple(entry.stat().st_mode & 0o777 for entry in (tmp_path / "package", tmp_path / "package" / "a")) == modes


def write_and_fail(path: Path, fail: Callable[[Path], None], *, force: bool = False) -> None:
    """Write half a package, then fail."""
    with write_package(path, force=force) as directory:
        (directory / "a").write_text("new", encoding="utf-8")
        fail(directory)


@failures
def test_failure_leaves_nothing(tmp_path: Path, fail: Callable[[Path], None], seen: type[BaseException]) -> None:
    with pytest.raises(seen):
        write_and_fail(tmp_path / "package", fail)

    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_no_folders_either(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "before").touch()

    for folder in ("new", "new/er", "there", "there/too"):
        with pytest.raises(ZeroDivisionError):
            write_and_fail(tmp_path / folder / "package", raise_error)

    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["there", "there/before"]


@failures
def test_failure_leaves_the_old_package(
    tmp_path: Path, fail: Callable[[Path], None], seen: type[BaseException]
) -> None:
    write_whole(tmp_path / "package", "old")

    with pytest.raises(seen):
        write_and_fail(tmp_path / "package", fail, force=True)

    assert content(tmp_path) == {"package/a": "old", f"package/{MANIFEST_FILE}": "old"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["package"]


def test_force_deletes_packages_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday").touch()

    with pytest.raises(ExportError) as caught:
        write_whole(tmp_path / "photos", "new", force=True)

    assert str(caught.value) == f"{tmp_path}/photos holds something else than a package; `force` will not delete it"
    assert (tmp_path / "photos" / "holiday").exists()


def test_full_disk_says_so(tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        write_and_fail(tmp_path / "package", fill_the_disk)

    assert str(caught.value) == f"{tmp_path}/package: no space left on the device; free some or change `out`"


def test_existing_package_is_replaced_only_by_force(tmp_path: Path) -> None:
    path = tmp_path / "package"
    write_whole(path, "old")
    (path / "only-old").write_text("old", encoding="utf-8")

    with pytest.raises(ExportError) as caught:
        write_whole(path, "new")
    assert str(caught.value) == f"{path} exists; use `force` to replace it, or another `out`"
    assert content(path) == {"a": "old", MANIFEST_FILE: "old", "only-old": "old"}

    write_whole(path, "new", force=True)
    assert content(tmp_path) == {"package/a": "new", f"package/{MANIFEST_FILE}": "new"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["package"]


def test_what_cannot_be_moved_is_refused_before_the_work_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a mount point or a lower layer of an overlay cannot, which only root could make here."""

    def elsewhere(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    path = tmp_path / "package"
    write_whole(path, "old")
    monkeypatch.setattr(Path, "rename", elsewhere)
    with (
        pytest.raises(
            ExportError, match=r"package cannot be replaced \(Invalid cross-device link\); choose another `out`$"
        ),
        write_package(path, force=True),
    ):
        pytest.fail("the work was begun")
    assert content(tmp_path) == {"package/a": "old", f"package/{MANIFEST_FILE}": "old"}


def test_file_is_never_replaced_by_a_package(tmp_path: Path) -> None:
    (tmp_path / "package").write_text("a file of the user's", encoding="utf-8")

    with pytest.raises(ExportError):
        write_whole(tmp_path / "package", "new", force=True)

    assert content(tmp_path) == {"package": "a file of the user's"}


def test_ctrl_c_at_any_line_of_the_replacement_leaves_a_whole_package(tmp_path: Path) -> None:
    """Interrupt `write_package` at its first line after the filling, its second, … until it ends uninterrupted."""
    outcomes = []
    for line in range(100):
        path = tmp_path / str(line) / "package"
        write_whole(path, "old")
        finished = replace_interrupted(path, line)
        assert content(path) in ({"a": "old", MANIFEST_FILE: "old"}, {"a": "new", MANIFEST_FILE: "new"}), (
            f"interrupted at line {line}"
        )
        outcomes.append((path / "a").read_text())
        if finished:
            break

    assert finished
    assert outcomes[0] == "old"
    assert outcomes[-1] == "new"


def replace_interrupted(path: Path, line: int) -> bool:
    """Replace `path`, raising KeyboardInterrupt before the given line that runs once it is filled.

    Lines of `write_package` and of the standard library's `shutil` count. Returns whether it ended before that line.
    """
    places = {package_directory.__file__, shutil.__file__}
    left = line

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in places:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    try:
        with write_package(path, force=True) as directory:
            for name in ("a", MANIFEST_FILE):
                (directory / name).write_text("new", encoding="utf-8")
            sys.settrace(trace)
    except (KeyboardInterrupt, OSError):  # interrupted after closing a directory, `shutil` fails to close it again
        return False
    finally:
        sys.settrace(previous)
    return True


def test_sealing_hashes_every_file(packages: Path, tmp_path: Path) -> None:
    manifest = dataclasses.replace(read_package(packages / "float32").manifest, files={})
    for name in ("model.onnx", "tokenizer.json", "extra"):
        (tmp_path / name).write_bytes(os.urandom(10))

    seal_package(tmp_path, manifest)

    found = read_package(tmp_path).manifest
    assert set(found.files) == {"model.onnx", "tokenizer.json", "extra"}
    assert dataclasses.replace(found, files={}) == manifest


# What a killed process leaves.


def killed_at(path: Path, step: str, *, force: bool) -> None:
    """Write a package in a process that is killed while it fills the directory, or before its last rename."""
    process = os.fork()
    if process:
        os.waitpid(process, 0)
        return
    try:
        with write_package(path, force=force) as directory:
            (directory / "a").write_text("half", encoding="utf-8")
            if step == "filling":
                os._exit(9)
            rename = Path.rename

            def stopped(self: Path, target: Path) -> Path:
                return rename(self, target) if self == path else os._exit(9)

            pytest.MonkeyPatch().setattr(Path, "rename", stopped)
    finally:
        os._exit(0)


@pytest.mark.parametrize("step", ["filling", "renaming"])
@pytest.mark.parametrize("force", [False, True])
def test_the_next_to_write_removes_what_a_killed_process_left(tmp_path: Path, step: str, force: bool) -> None:
    path = tmp_path / "package"
    if force:
        write_whole(path, "old")
    killed_at(path, step, force=force)
    left = sorted(entry.name for entry in tmp_path.iterdir())
    assert len(left) == 1 + force

    clear_leftovers(path)
    assert content(tmp_path) == ({"package/a": "old", f"package/{MANIFEST_FILE}": "old"} if force else {})

    write_whole(path, "new", force=force)
    assert content(tmp_path) == {"package/a": "new", f"package/{MANIFEST_FILE}": "new"}


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    with write_package(tmp_path / "package") as directory:
        (directory / "a").write_text("1", encoding="utf-8")
        clear_leftovers(tmp_path / "package")
        assert (directory / "a").exists()

    assert content(tmp_path) == {"package/a": "1"}


def test_names_that_only_look_alike_stay(tmp_path: Path) -> None:
    for name in (".package-before", ".package-0123456", ".packages-01234567", "package-01234567", ".package-01234567x"):
        (tmp_path / name).mkdir()
    before = sorted(tmp_path.iterdir())
    write_whole(tmp_path / "package", "1")

    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "package"])
