"""Directories among the user's caches, in which things are kept from one process to the next."""

from __future__ import annotations

import os
from pathlib import Path

#: The value of an option or variable that names a directory, for none.
OFF = "off"


def kept_in(where: str | Path | None, variable: str, name: str) -> Path | None:
    """Return the directory `where`, or what an environment variable names, or else `name` among the user's caches.

    None where it is `OFF`, or nobody is at home.
    """
    chosen = where if where is not None else os.environ.get(variable) or None
    if chosen is not None:
        return None if str(chosen) == OFF else Path(chosen)
    try:
        return user_caches() / "expe-edge" / name
    except RuntimeError:
        return None


def user_caches() -> Path:
    """Return the directory of the user's caches, as the XDG base directory specification and Windows name it.

    Raises:
        RuntimeError: the user has no home directory.
    """
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        directory = Path(os.environ.get(name, ""))
        if directory.is_absolute():
            return directory
    return Path.home() / ".cache"


def require_private(directory: Path) -> None:
    """Raise `OSError` for a directory that is another user's, or that others may write to."""
    if hasattr(os, "getuid"):
        status = directory.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise PermissionError(f"{directory} can be written to by others")
