"""The control groups that Linux counts this process in, of both versions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """Yield the version and the directory of every group above this process that may limit what `controller` counts.

    Directories may not be there: in a container the path is that of the host. root: of the file system that `proc` and
    `sys` are looked for in.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers == "":
            version, top = 2, root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            version, top = 1, root / "sys/fs/cgroup" / controller
        else:
            continue
        here = top / path.lstrip("/")
        for directory in (here, *here.parents):
            yield version, directory
            if directory == top:
                break
