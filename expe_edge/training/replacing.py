"""Replacing a run: the one before is kept beside until the new one is complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from expe_edge.errors import ConfigError
from expe_edge.package.directory import why_unwritable
from expe_edge.progress import note
from expe_edge.training.settings import TRAINER_DIRECTORY, TRAINING_FILE, WEIGHTS_FILE


def require_room(out: Path, *, force: bool) -> None:
    """Raise `ConfigError` where `out` may not or cannot be made anew."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file, not a directory; choose another `out`")
    require_writable(out)
    if not out.exists() or not any(out.iterdir()):
        return
    if not force:
        raise ConfigError(f"{out} exists; use `force` to replace it, `resume` to continue it, or another `out`")
    if not (out / TRAINING_FILE).is_file():
        raise ConfigError(f"{out} holds something else than a training run; `force` will not delete it")
    if Path.cwd().is_relative_to(out.resolve()):
        raise ConfigError(f"{out} holds the current directory; use `force` from elsewhere")
    require_writable(out.resolve().parent)  # into which it is moved


def require_writable(directory: Path) -> None:
    """Raise `ConfigError` before long work where a checkpoint could not be written to `directory` after it."""
    refused = why_unwritable(directory)
    if refused is not None:
        raise ConfigError(f"{refused}; choose another `out`")


def require_outside(out: Path, paths: Iterable[str | Path], setting: str) -> None:
    """Raise `ConfigError` where one of the paths that `setting` names lies in `out`, which is to be replaced."""
    for path in paths:
        if Path(path).exists() and Path(path).resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"`{setting}` {path} lies in {out}, which `force` replaces; choose another `out`")


def bring_back(out: Path) -> None:
    """Undo a `set_aside` whose process was killed before it made anything in `out`."""
    kept = _kept(out)
    if kept.exists() and (not out.exists() or not any(out.iterdir())):
        kept.replace(out.resolve())


def set_aside(out: Path) -> None:
    """Move what stands at `out` beside it, and make `out` an empty directory.

    An unfinished run is deleted where a run before it is kept already.

    Raises:
        ConfigError: it cannot be moved, as a mount point cannot; all is left as it was.
    """
    kept = _kept(out)
    if out.exists() and any(out.iterdir()):
        if kept.exists():
            unfinished = not (out / WEIGHTS_FILE).exists()
            _discard(out.resolve() if unfinished else kept, out)
        try:
            if out.exists() and not kept.exists():
                out.resolve().rename(kept)
        except OSError as error:
            raise ConfigError(f"{out} cannot be replaced ({error.strerror}); choose another `out`") from error
    out.resolve().mkdir(parents=True, exist_ok=True)


@contextmanager
def kept_until_complete(out: Path) -> Iterator[None]:
    """Delete what `set_aside` moved once the block is through.

    Where the block fails, the new run is deleted and the one before brought back, unless --resume can complete the new.
    """
    kept, existed = _kept(out), out.exists()
    try:
        yield
    except BaseException:
        resumable = any((out / TRAINER_DIRECTORY).glob("checkpoint-*"))
        if kept.exists() and resumable:
            note(f"{kept} is the run before, until `resume` completes this one")
        elif not resumable and (out / TRAINING_FILE).exists() and not (out / WEIGHTS_FILE).exists():
            _empty(out)
            if not existed:
                out.resolve().rmdir()
            bring_back(out)
        raise
    if kept.exists():
        _discard(kept, out)


def _empty(out: Path) -> None:
    """Delete what an unfinished run has made; its record, which tells that it is one, last."""
    for path in sorted(out.iterdir(), key=lambda path: path.name == TRAINING_FILE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _discard(directory: Path, out: Path) -> None:
    """Delete a run at `out` or kept beside it, under a name that no half of it can be taken for a run by."""
    doomed = _beside(out, "discarded")
    shutil.rmtree(doomed, ignore_errors=True)  # of a process that was killed meanwhile
    directory.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _kept(out: Path) -> Path:
    return _beside(out, "before")


def _beside(out: Path, what: str) -> Path:
    place = out.resolve()
    return place.with_name(f".{place.name}-{what}")
