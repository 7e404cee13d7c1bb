"""Arrays put aside, in memory while they are few, on disk beyond: the logits of a long text take 4·V bytes a token."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from os import SEEK_END
from tempfile import SpooledTemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt

#: Bytes of arrays that stay in memory.
IN_MEMORY = 2**26


class Spool:
    """Arrays kept in their order, to be read one after another as often as needed, by one reader at a time.

    in_memory: bytes of them that stay in memory.
    """

    def __init__(self, arrays: Iterable[npt.NDArray[Any]] = (), in_memory: int = IN_MEMORY) -> None:
        self._file = SpooledTemporaryFile(max_size=in_memory)  # noqa: SIM115  # open as long as this is
        weakref.finalize(self, self._file.close)
        self._count = 0
        for array in arrays:
            self.append(array)

    def append(self, array: npt.NDArray[Any]) -> None:
        """Add an array; no reader may be halfway."""
        self._file.seek(0, SEEK_END)
        np.lib.format.write_array(self._file, array, allow_pickle=False)
        self._count += 1

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        self._file.seek(0)
        for _ in range(self._count):
            yield np.lib.format.read_array(self._file, allow_pickle=False)
