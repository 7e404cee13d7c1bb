"""The key/value cache: a buffer that the graph appends to in place, or two between which it grows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from expe_edge.errors import GenerationError
from expe_edge.package.contract import GraphContract

Ids = npt.NDArray[np.int64]
Array = npt.NDArray[Any]


class Cache(ABC):
    """Keys and values of `batch` rows with room for `capacity` tokens each, in CPU memory.

    Attributes:
        lengths: tokens held by each row, (batch,) int64.
    """

    def __init__(self, contract: GraphContract, batch: int, capacity: int, lengths: Ids | None = None) -> None:
        self.contract, self.batch, self.capacity = contract, batch, capacity
        self.lengths = np.zeros(batch, dtype=np.int64) if lengths is None else lengths
        self.columns = np.arange(capacity, dtype=np.int64)
        self.ones = np.ones((1, capacity), dtype=np.int64)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all buffers."""

    @abstractmethod
    def row(self, index: int) -> Cache:
        """Return row `index` as a cache of one row: what is put there is put here."""

    @abstractmethod
    def bind(self, binding: ort.IOBinding, tokens: int) -> None:
        """Bind past and present for a run that appends `tokens` to every row."""

    def advance(self, tokens: int) -> None:
        """Note that a run has appended `tokens` to every row."""
        self.lengths += tokens

    def mask(self, tokens: int) -> Ids:
        """Return the attention mask of a run that appends `tokens` to every row, (batch, total_sequence).

        Raises:
            GenerationError: they do not fit.
        """
        longest = max(self.lengths.tolist()) + tokens
        if longest > self.capacity:
            raise GenerationError(f"the cache holds {self.capacity} tokens; {longest} are needed")
        if self.batch == 1:  # nothing to compute where each token's microseconds count
            return self.ones[:, :longest]
        return self._mask(tokens, longest)

    @abstractmethod
    def _mask(self, tokens: int, longest: int) -> Ids:
        """The mask of several rows, of which the longest will have `longest` tokens."""


class SharedCache(Cache):
    """One buffer for each layer and part, (batch, Hkv, capacity, D), allocated once: past and present of every step.

    GroupQueryAttention appends in place when both are the same memory.
    """

    def __init__(self, contract: GraphContract, batch: int, capacity: int) -> None:
        super().__init__(contract, batch, capacity)
        shape = (batch, contract.key_value_heads, capacity, contract.head_size)
        self._hold([np.zeros(shape, dtype=contract.cache_dtype) for _ in contract.past_names])

    def _hold(self, arrays: list[Array]) -> None:
        self.arrays = arrays
        self.values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]
        self.bound: ort.IOBinding | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(array.nbytes for array in self.arrays)

    def row(self, index: int) -> SharedCache:
        """Return row `index` as a cache of one row over the same memory."""
        view = object.__new__(SharedCache)
        Cache.__init__(view, self.contract, 1, self.capacity, self.lengths[index : index + 1])
        view._hold([array[index : index + 1] for array in self.arrays])
        return view

    def bind(self, binding: ort.IOBinding, tokens: int) -> None:
        """Bind every buffer as past and as present: once, for it stays where it is."""
        if binding is self.bound:
            return
        names = zip(self.contract.past_names, self.contract.present_names, self.values, strict=True)
        for past, present, value in names:
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        self.bound = binding

    def _mask(self, tokens: int, longest: int) -> Ids:
        mask: Ids = (self.columns[:longest] < self.lengths[:, None] + tokens).astype(np.int64)
        return mask


class GrowingCache(Cache):
    """Two buffers for each layer and part: every step reads the past from one and writes the present to the other.

    Rows of a batch are filled apart and joined when they first run together: padded to the longest, so that padding
    lies between the tokens they had and those to come. The mask says where.
    """

    def __init__(self, contract: GraphContract, batch: int, capacity: int, lengths: Ids | None = None) -> None:
        super().__init__(contract, batch, capacity, lengths)
        self.names = list(zip(contract.past_names, contract.present_names, strict=True))
        size = batch * contract.key_value_heads * capacity * contract.head_size
        # Memory that is never written to, as that of rows apart, is never taken.
        self.buffers = [[np.empty(size, dtype=contract.cache_dtype) for _ in self.names] for _ in range(2)]
        self.rows: list[GrowingCache] = []  # where they are apart
        self.tokens = np.ones((batch, capacity), dtype=np.bool_)  # which columns are tokens
        self._hold(0)

    def _hold(self, columns: int) -> None:
        self.held = columns
        self.past = self._values(0, columns)

    def _arrays(self, side: int, columns: int) -> list[Array]:
        """The first `columns` tokens' worth of one buffer of each pair, (batch, Hkv, columns, D) each."""
        shape = (self.batch, self.contract.key_value_heads, columns, self.contract.head_size)
        size = int(np.prod(shape))
        return [buffer[:size].reshape(shape) for buffer in self.buffers[side]]

    def _values(self, side: int, columns: int) -> list[ort.OrtValue]:
        return [ort.OrtValue.ortvalue_from_numpy(array) for array in self._arrays(side, columns)]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, whether memory has been taken for them yet or not; rows that are apart have more."""
        return sum(buffer.nbytes for side in self.buffers for buffer in side)

    def row(self, index: int) -> GrowingCache:
        """Return row `index` as a cache of one row, until all rows run together again."""
        if self.batch == 1:
            return self
        if not self.rows:
            self._part()
        return self.rows[index]

    def bind(self, binding: ort.IOBinding, tokens: int) -> None:
        """Bind the one buffer of each pair as past and the other as present."""
        self._join()
        self.present = self._values(1, self.held + tokens)
        for (past, present), old, new in zip(self.names, self.past, self.present, strict=True):
            binding.bind_ortvalue_input(past, old)
            binding.bind_ortvalue_output(present, new)

    def advance(self, tokens: int) -> None:
        """Make the present the past."""
        super().advance(tokens)
        self.held += tokens
        self.past = self.present
        self.buffers.reverse()

    def _mask(self, tokens: int, longest: int) -> Ids:
        self._join()
        return self.tokens[:, : self.held + tokens].astype(np.int64)

    def _part(self) -> None:
        """Give every row a cache of its own, without the padding."""
        with memory_for(self.contract, self.batch, self.capacity):
            self.rows = [
                GrowingCache(self.contract, 1, self.capacity, self.lengths[index : index + 1])
                for index in range(self.batch)
            ]
        for index, row in enumerate(self.rows):
            kept = self.tokens[index, : self.held]
            row._hold(int(self.lengths[index]))
            for own, joined in zip(row._arrays(0, row.held), self._arrays(0, self.held), strict=True):
                own[0] = joined[index][:, kept]

    def _join(self) -> None:
        """Bring rows that are apart together, padded with zeros, and note where."""
        if not self.rows:
            return
        self._hold(max(row.held for row in self.rows))
        self.tokens[:] = True
        for index, row in enumerate(self.rows):
            self.tokens[index, row.held : self.held] = False
            for joined, own in zip(self._arrays(0, self.held), row._arrays(0, row.held), strict=True):
                joined[index, :, : row.held] = own[0]
                joined[index, :, row.held :] = 0
        self.rows = []


def make_cache(contract: GraphContract, batch: int, capacity: int) -> Cache:
    """Return an empty cache of the kind that the graph wants.

    Raises:
        GenerationError: memory has no room for it.
    """
    with memory_for(contract, batch, capacity):
        return (GrowingCache if contract.growing_cache else SharedCache)(contract, batch, capacity)


@contextmanager
def memory_for(contract: GraphContract, batch: int, capacity: int) -> Iterator[None]:
    """Turn what NumPy says where memory has no room for a cache into `GenerationError`."""
    try:
        yield
    except MemoryError as error:
        raise GenerationError(
            f"no memory for a cache of {batch} × {capacity} tokens, {batch * capacity * contract.cache_bytes:,} bytes; "
            "lower `max_new_tokens` or `cache_length`"
        ) from error
