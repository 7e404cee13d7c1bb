"""The memory of a cache that grows: two buffers, between which every step copies the past."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from expe_edge.package.contract import GraphContract
from expe_edge.runtime.storage import BLOCK, Array, Ids, Storage, grown, memory_for


class Pair:
    """Two buffers for each layer and part: a step reads the past from one and writes the present to the other.

    Attributes:
        columns: tokens in the past, padding included.
    """

    def __init__(self, contract: GraphContract, batch: int, capacity: int) -> None:
        self.contract, self.batch, self.capacity, self.columns = contract, batch, capacity, 0
        self.sides = [[np.empty(0, dtype=contract.cache_dtype) for _ in contract.past_names] for _ in range(2)]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for side in self.sides for buffer in side)

    def past(self) -> list[Array]:
        """What is held, (batch, Hkv, columns, D) each."""
        return self._shaped(0, self.columns)

    def other(self, columns: int) -> list[Array]:
        """Room for `columns` tokens in the other buffers, (batch, Hkv, columns, D) each."""
        shape = (self.batch, self.contract.key_value_heads, columns, self.contract.head_size)
        buffers = self.sides[1]
        if buffers[0].size < np.prod(shape):
            self.sides[1] = []  # before their successors are made
            room = grown(self.columns, columns, max(self.capacity, columns))
            with memory_for(self.contract, self.batch, room):
                size = self.batch * self.contract.key_value_heads * room * self.contract.head_size
                self.sides[1] = [np.empty(size, dtype=self.contract.cache_dtype) for _ in self.contract.past_names]
        return self._shaped(1, columns)

    def turn(self, columns: int) -> None:
        """Let what has been written to the other buffers be the past, of `columns` tokens."""
        self.columns = columns
        self.sides.reverse()

    def _shaped(self, side: int, columns: int) -> list[Array]:
        shape = (self.batch, self.contract.key_value_heads, columns, self.contract.head_size)
        return [buffer[: int(np.prod(shape))].reshape(shape) for buffer in self.sides[side]]


class GrowingStorage(Storage):
    """A pair of buffers for every row, and one for rows that run together, which are padded to the longest.

    Padding then lies between the tokens that rows had when they joined and those to come. The mask says where. Rows
    part again, without the padding, when one of them is filled, read or changed by itself, or others join.
    """

    def __init__(self, contract: GraphContract, batch: int, capacity: int) -> None:
        super().__init__(contract, batch, capacity)
        self.columns = capacity  # taken as steps write
        self.rows = [Pair(contract, 1, capacity) for _ in range(batch)]
        self.together = range(0)  # rows that have joined
        self.joined = Pair(contract, 0, capacity)
        self.tokens = np.empty((0, 0), dtype=np.bool_)  # which columns are tokens, of rows that have joined

    @property
    def nbytes(self) -> int:
        return self.joined.nbytes + sum(row.nbytes for row in self.rows)

    def reserve(self, columns: int) -> None:
        """Nothing to do: the buffer that a step writes to grows then."""

    def read(self, row: int) -> list[Array]:
        return [array[0] for array in self._apart(row).past()]

    def write(self, row: int, tensors: Sequence[Array], length: int) -> None:
        pair = self._apart(row)
        for array, tensor in zip(pair.other(length), tensors, strict=True):
            array[0] = tensor
        pair.turn(length)
        self.lengths[row] = length
        self.version += 1

    def _remove(self, row: int, begin: int, end: int) -> None:
        pair = self._apart(row)
        kept = pair.columns - (end - begin)
        for array, held in zip(pair.other(kept), pair.past(), strict=True):
            array[:, :, :begin] = held[:, :, :begin]
            array[:, :, begin:] = held[:, :, end:]
        pair.turn(kept)
        self.version += 1

    def bind(self, binding: ort.IOBinding, begin: int, end: int, tokens: int) -> None:
        pair = self._pair(begin, end)
        values = zip(pair.past(), pair.other(pair.columns + tokens), strict=True)
        names = zip(self.contract.past_names, self.contract.present_names, strict=True)
        for (past, present), (old, new) in zip(names, values, strict=True):
            binding.bind_ortvalue_input(past, ort.OrtValue.ortvalue_from_numpy(old))
            binding.bind_ortvalue_output(present, ort.OrtValue.ortvalue_from_numpy(new))

    def bind_lengths(self, binding: ort.IOBinding, begin: int, end: int) -> None:
        """Nothing to do: the mask says it all."""

    def advance(self, begin: int, end: int, tokens: int) -> None:
        super().advance(begin, end, tokens)
        pair = self._pair(begin, end)
        pair.turn(pair.columns + tokens)
        self.version += 1

    def mask(self, begin: int, end: int, tokens: int, columns: int) -> Ids:
        if end - begin == 1:
            return np.ones((1, columns), dtype=np.int64)
        needed = self._pair(begin, end).columns + tokens
        if needed > self.tokens.shape[1]:
            more = np.ones((end - begin, needed // 4 + BLOCK), dtype=np.bool_)
            self.tokens = np.concatenate([self.tokens, more], axis=1)
        return self.tokens[:, :needed].astype(np.int64)

    def _apart(self, row: int) -> Pair:
        """The buffers of a row by itself."""
        if row in self.together:
            self._part()
        return self.rows[row]

    def _pair(self, begin: int, end: int) -> Pair:
        """The buffers of rows that run together."""
        if end - begin == 1:
            return self._apart(begin)
        if self.together != range(begin, end):
            self._part()
            self._join(begin, end)
        return self.joined

    def _part(self) -> None:
        """Give every row that has joined its own buffers again, without the padding."""
        for index, row in enumerate(self.together):
            kept, pair, length = self.tokens[index, : self.joined.columns], self.rows[row], int(self.lengths[row])
            for own, joined in zip(pair.other(length), self.joined.past(), strict=True):
                own[0] = joined[index][:, kept]
            pair.turn(length)
        self.together, self.joined = range(0), Pair(self.contract, 0, self.capacity)
        self.version += 1

    def _join(self, begin: int, end: int) -> None:
        """Bring rows together, padded with zeros, and note where."""
        rows = self.rows[begin:end]
        longest = max(row.columns for row in rows)
        joined = Pair(self.contract, len(rows), self.capacity)
        self.tokens = np.ones((len(rows), longest), dtype=np.bool_)
        arrays = joined.other(longest)
        for index, row in enumerate(rows):
            self.tokens[index, row.columns :] = False
            for array, own in zip(arrays, row.past(), strict=True):
                array[index, :, : row.columns] = own[0]
                array[index, :, row.columns :] = 0
        joined.turn(longest)
        for index in range(begin, end):
            self.rows[index] = Pair(self.contract, 1, self.capacity)  # what it held is in `joined`
        self.together, self.joined = range(begin, end), joined
        self.version += 1
