"""Which tokens a row of a cache has read: those it holds, and a digest of those that a window has dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from expe_edge.runtime.window import Window

Ids = npt.NDArray[np.int64]

#: Ids that a history has room for at first.
FIRST_ROOM = 64


class History:
    """The tokens that a row has read: at first those of `ids` (T,).

    Attributes:
        dropped: how many tokens behind the sinks a window has dropped. digest: of these, b"" where there are none.
    """

    def __init__(self, ids: Ids | None = None) -> None:
        self.clear()
        self._hold(np.empty(FIRST_ROOM, dtype=np.int64) if ids is None else ids.astype(np.int64))
        self._held = 0 if ids is None else len(ids)

    def _hold(self, ids: Ids) -> None:
        """Take the memory in which ids are held. Cells of it change without NumPy: see `Storage.advance`."""
        self._ids, self._cells = ids, ids.data

    def clear(self) -> None:
        """Forget all."""
        self._held, self.dropped, self.digest = 0, 0, b""

    def assign(self, other: History) -> None:
        """Become a copy of another history."""
        self._hold(other._ids.copy())
        self._held, self.dropped, self.digest = other._held, other.dropped, other.digest

    @property
    def ids(self) -> Ids:
        """Ids of the tokens that are held, in order, (held,); valid until the next change."""
        return self._ids[: self._held]

    def append(self, ids: Sequence[int]) -> None:
        """Note tokens that have been read."""
        held = self._held + len(ids)
        if held > len(self._cells):
            grown = np.empty(max(held, 2 * len(self._cells)), dtype=np.int64)
            grown[: self._held] = self.ids
            self._hold(grown)
        for place, token in enumerate(ids, self._held):
            self._cells[place] = token
        self._held = held

    def truncate(self, held: int) -> None:
        """Forget all but the first `held` tokens of those held."""
        self._held = held

    def drop(self, begin: int, end: int) -> None:
        """Forget the held tokens [begin, end), but for their digest."""
        self.digest = _chained(self.digest, self._ids[begin:end])
        self._ids[begin : self._held - (end - begin)] = self._ids[end : self._held].copy()
        self._held -= end - begin
        self.dropped += end - begin

    def shared(self, ids: Ids, window: Window | None) -> int:
        """Return how many tokens (T,) at the beginning of `ids` are held or dropped here: 0 where dropped ones differ.

        window: by which tokens were dropped.
        """
        sinks = 0 if window is None else window.sinks
        if self.dropped and window is not None:
            digest, end = b"", sinks + self.dropped
            for begin in range(sinks, end, window.block):
                digest = _chained(digest, ids[begin : min(begin + window.block, end)])
            if len(ids) < end or digest != self.digest:
                return 0
            ids = np.concatenate([ids[:sinks], ids[end:]])
        most = min(self._held, len(ids))
        differ = np.flatnonzero(ids[:most] != self._ids[:most])
        same = int(differ[0]) if len(differ) else most
        if not self.dropped:
            return same
        return 0 if same < sinks else same + self.dropped


def _chained(digest: bytes, ids: Ids) -> bytes:
    return hashlib.sha256(digest + ids.astype("<i8").tobytes()).digest()
