"""What killed processes have left half-written, told from what others are writing just now."""

from __future__ import annotations

import time
from pathlib import Path

#: Seconds after which nobody writes any more to what has not changed since.
ABANDONED = 3600


def is_abandoned(place: Path) -> bool:
    """Tell whether a file or directory has been as it is for longer than `ABANDONED`.

    Raises:
        OSError: there is none, or it cannot be looked at.
    """
    return time.time() - place.stat().st_mtime > ABANDONED
