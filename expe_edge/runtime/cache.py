"""The key/value cache: one buffer for each layer and part, allocated once, written in place by the graph."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from expe_edge.package import GraphContract


class Cache:
    """Keys and values of `batch` rows with room for `capacity` tokens each.

    The buffers are (batch, Hkv, capacity, D) and serve as past and as present of a step: GroupQueryAttention appends
    in place when both are the same memory. They stay in CPU memory, where its float32 kernel runs.

    Attributes:
        lengths: tokens held by each row, (batch,) int64.
    """

    def __init__(self, contract: GraphContract, batch: int, capacity: int) -> None:
        shape = (batch, contract.key_value_heads, capacity, contract.head_size)
        self.contract, self.batch, self.capacity = contract, batch, capacity
        self.arrays: list[npt.NDArray[np.generic]] = [
            np.zeros(shape, dtype=contract.cache_dtype) for _ in contract.past_names
        ]
        self.values = [ort.OrtValue.ortvalue_from_numpy(array) for array in self.arrays]
        self.lengths = np.zeros(batch, dtype=np.int64)

    def row(self, index: int) -> Cache:
        """Return row `index` as a cache of one row over the same memory."""
        view = object.__new__(Cache)
        view.contract, view.batch, view.capacity = self.contract, 1, self.capacity
        view.arrays = [array[index : index + 1] for array in self.arrays]
        view.values = [ort.OrtValue.ortvalue_from_numpy(array) for array in view.arrays]
        view.lengths = self.lengths[index : index + 1]
        return view

    def bind(self, binding: ort.IOBinding) -> None:
        """Bind every buffer as past and as present."""
        names = zip(self.contract.past_names, self.contract.present_names, self.values, strict=True)
        for past, present, value in names:
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
