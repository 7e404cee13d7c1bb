"""What the memory of a key/value cache can do, whatever its kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from expe_edge.errors import GenerationError
from expe_edge.package.contract import GraphContract

Ids = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

#: Tokens by which memory grows at least, and its growth at least, as a part of what there is.
BLOCK, GROWTH = 256, 0.25


def grown(columns: int, needed: int, capacity: int) -> int:
    """Return for how many tokens to take memory where there is some for `columns` and `needed` are to fit."""
    wanted = max(needed, int(columns * (1 + GROWTH)))
    return min(capacity, -(-wanted // BLOCK) * BLOCK)


class Storage(ABC):
    """Keys and values of `batch` rows with room for up to `capacity` tokens each. Tensors are in the contract's order.

    Rows are named by index, several that run together by the half-open range [begin, end).

    Attributes:
        lengths: tokens that each row holds, (batch,) int64. columns: tokens for which every row has memory. version:
            differs whenever what was bound is no longer where it was.
    """

    columns: int

    def __init__(self, contract: GraphContract, batch: int, capacity: int) -> None:
        self.contract, self.batch, self.capacity = contract, batch, capacity
        self.lengths: Ids = np.zeros(batch, dtype=np.int64)
        self._counts = [self.lengths.data]  # of tokens, that every run adds to
        self.version = 0

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all buffers."""

    def prepare(self, begin: int, end: int, tokens: int, longest: int) -> None:
        """Make room for a run of the rows that appends `tokens` to each, and of which the longest has `longest` then.

        Raises:
            GenerationError: memory has no room.
        """
        self.reserve(longest)

    def earliest(self, row: int) -> int:
        """The least number of tokens above 0 that a row can go back to."""
        return 0

    @abstractmethod
    def reserve(self, columns: int) -> None:
        """Make room for `columns` tokens in every row, keeping what they hold.

        Raises:
            GenerationError: memory has no room.
        """

    @abstractmethod
    def read(self, row: int) -> list[Array]:
        """Return what a row holds, as much as heads see of it, (heads, n, D) each; valid until the next change."""

    @abstractmethod
    def write(self, row: int, tensors: Sequence[Array], length: int) -> None:
        """Let a row hold `length` tokens' `tensors`, as `read` returns them, for which there is room."""

    def remove(self, row: int, begin: int, end: int) -> None:
        """Take the tokens [begin, end) out of what a row holds; those behind them move up."""
        if end > begin:
            self._remove(row, begin, end)
            self.lengths[row] -= end - begin

    @abstractmethod
    def _remove(self, row: int, begin: int, end: int) -> None:
        """Move what is behind those tokens, of which there are some; the row still has its length."""

    @abstractmethod
    def bind(self, binding: ort.IOBinding, begin: int, end: int, tokens: int) -> None:
        """Bind past and present of the rows for a run that appends `tokens` to each."""

    @abstractmethod
    def bind_lengths(self, binding: ort.IOBinding, begin: int, end: int) -> None:
        """Bind what the graph is told of the rows besides. `bind` does it too; from then on it changes in place."""

    def advance(self, begin: int, end: int, tokens: int) -> None:
        """Note that such a run has been made.

        In Python's integers: a run displaces NumPy's code from the processor's caches, and its sum takes 50 µs then.
        """
        for counts in self._counts:
            for row in range(begin, end):
                counts[row] += tokens

    @abstractmethod
    def mask(self, begin: int, end: int, tokens: int, columns: int) -> Ids:
        """Return the attention mask of such a run, (end − begin, total_sequence).

        columns: its length, at least the longest row's; of no account where the tokens of rows are not side by side.
        """


@contextmanager
def memory_for(contract: GraphContract, batch: int, columns: int) -> Iterator[None]:
    """Turn what NumPy says where memory has no room for a cache into `GenerationError`."""
    try:
        yield
    except MemoryError as error:
        raise GenerationError(
            f"no memory for a cache of {batch} × {columns} tokens, {batch * columns * contract.cache_bytes:,} bytes; "
            "lower `max_new_tokens` or `cache_length`"
        ) from error
