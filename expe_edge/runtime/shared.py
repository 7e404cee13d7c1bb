"""The memory of a cache that the graph appends to in place; heads with a window have room for little more than that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from expe_edge.package.contract import GraphContract
from expe_edge.runtime.device import Device, DeviceBuffer, HostBuffer
from expe_edge.runtime.memory import PREFILL_CHUNK, SPARE
from expe_edge.runtime.storage import BLOCK, Array, Ids, Storage, grown, memory_for


class SharedStorage(Storage):
    """One buffer for each layer, group of heads and part, (batch, heads, columns, D): past and present of every step.

    Attention appends in place when both are the same memory, which may be a device's. When a window's buffer is full,
    what is still seen of it moves to its beginning.

    Attributes:
        kept: of every group the tokens that each row has in its buffers, (batch,) int64: the last ones, and as many as
            its next query sees at least; all of them where it has no window.
    """

    def __init__(self, contract: GraphContract, batch: int, capacity: int, device: Device | None = None) -> None:
        super().__init__(contract, batch, capacity)
        self.device = device
        self.groups = contract.groups
        self.kept: list[Ids] = [self.lengths.copy() if group.window else self.lengths for group in self.groups]
        self._counts += [kept.data for kept in self.kept if kept is not self.lengths]
        self.free = PREFILL_CHUNK  # tokens that a run may append to a window
        self.columns = 0
        self.buffers: list[HostBuffer | DeviceBuffer] = [
            HostBuffer(np.zeros((batch, group.heads, 0, contract.head_size), dtype=contract.cache_dtype))
            for group in contract.cache_groups
        ]
        self.reserve(min(BLOCK, capacity))

    def _group(self, tensor: int) -> int:
        """The group of a tensor of the cache."""
        return tensor // 2 % len(self.groups)

    def _room(self, group: int, columns: int) -> int:
        """Columns of a group's buffers where rows have room for `columns` tokens."""
        return self.groups[group].seen(columns, SPARE + self.free)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def arrays(self) -> list[Array]:
        """What all buffers hold; copies, where they are a device's."""
        return [buffer.read() for buffer in self.buffers]

    def reserve(self, columns: int) -> None:
        if columns > self.columns:
            self._move(grown(self.columns, columns, self.capacity))

    def _move(self, columns: int) -> None:
        """Take buffers for rows of `columns` tokens, in place of those that are not large enough."""
        with memory_for(self.contract, self.batch, columns):
            for index, buffer in enumerate(self.buffers):  # one after the other, so that no two caches are held
                group = self._group(index)
                room = self._room(group, columns)
                if room > buffer.shape[2]:
                    array = buffer.read()
                    wider = np.zeros((*array.shape[:2], room, array.shape[3]), dtype=array.dtype)
                    for row, length in enumerate(self.kept[group].tolist()):
                        wider[row, :, :length] = array[row, :, :length]
                    self.buffers[index] = DeviceBuffer(wider, self.device) if self.device else HostBuffer(wider)
        self.columns = columns
        self.version += 1

    def prepare(self, begin: int, end: int, tokens: int, longest: int) -> None:
        super().prepare(begin, end, tokens, longest)
        if self.contract.windows:
            self._slide(begin, end, tokens)

    def _slide(self, begin: int, end: int, tokens: int) -> None:
        """Let windows forget what the run no longer sees, where they have no room for more."""
        if tokens > self.free:
            self.free = tokens
            self._move(self.columns)
        for index, group in enumerate(self.groups):
            if group.window and max(self.kept[index][begin:end].tolist()) + tokens > self._room(index, self.columns):
                for row in range(begin, end):
                    self._forget(index, row)

    def _forget(self, index: int, row: int) -> None:
        """Keep of a group's window what is seen, and what may be taken back, at the beginning of its buffers."""
        held = int(self.kept[index][row])
        kept = min(held, self.groups[index].window + SPARE)
        for tensor, buffer in enumerate(self.buffers):
            if self._group(tensor) == index:
                with buffer.edit() as array:
                    move_up(array[row], 0, held - kept, held)
        self.kept[index][row] = kept

    def earliest(self, row: int) -> int:
        length, earliest = int(self.lengths[row]), 0
        for group, kept in zip(self.groups, self.kept, strict=True):
            gone = length - int(kept[row])
            if gone:
                earliest = max(earliest, gone + group.window)
        return earliest

    def read(self, row: int) -> list[Array]:
        length, parts = int(self.lengths[row]), []
        for index, buffer in enumerate(self.buffers):
            array, group = buffer.read(), self._group(index)
            end = int(self.kept[group][row])
            parts.append(array[row, :, end - self.groups[group].seen(length) : end])
        return parts

    def write(self, row: int, tensors: Sequence[Array], length: int) -> None:
        for index, tensor in enumerate(tensors):
            with self.buffers[index].edit() as array:
                array[row, :, : tensor.shape[1]] = tensor
            self.kept[self._group(index)][row] = tensor.shape[1]
        self.lengths[row] = length

    def _remove(self, row: int, begin: int, end: int) -> None:
        length = int(self.lengths[row])
        for index, buffer in enumerate(self.buffers):
            kept = int(self.kept[self._group(index)][row])
            gone = length - kept  # tokens before those in a window
            first, last = max(begin - gone, 0), max(end - gone, 0)
            if first < last < kept:  # else nothing is behind them
                with buffer.edit() as array:
                    move_up(array[row], first, last, kept)
        for group, held in zip(self.groups, self.kept, strict=True):
            if group.window:
                gone = length - int(held[row])
                held[row] -= max(end - gone, 0) - max(begin - gone, 0)

    def bind(self, binding: ort.IOBinding, begin: int, end: int, tokens: int) -> None:
        for past, present, buffer in zip(
            self.contract.past_names, self.contract.present_names, self.buffers, strict=True
        ):
            buffer.bind(binding, past, present, begin, end)
        self.bind_lengths(binding, begin, end)

    def bind_lengths(self, binding: ort.IOBinding, begin: int, end: int) -> None:
        for name, kept in zip(self.contract.window_lengths, self.kept, strict=True):
            if name:  # memory that changes in place
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(kept[begin:end]))

    def mask(self, begin: int, end: int, tokens: int, columns: int) -> Ids:
        held = self.lengths[begin:end, None] + tokens
        mask: Ids = (np.arange(columns) < held).astype(np.int64)
        return mask


def move_up(part: Array, begin: int, end: int, length: int) -> None:
    """Take the columns [begin, end) out of (Hkv, columns, D), of which `length` are held; those behind them move up."""
    for head in part:
        head[begin : begin + length - end] = head[end:length]  # NumPy minds that they overlap
