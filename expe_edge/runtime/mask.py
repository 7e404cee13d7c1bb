"""Attention masks of runs over a cache: which columns are tokens, the run's own included.

They are longer than the rows, as batches padded on the right are, and rows grow within them. onnxruntime plans the
memory of a small model's run by the shapes of its inputs, and a run of the same shapes takes one block by that plan,
where it would else ask for the memory of every node: a tenth to a sixth of a step. Of larger models it saves making a
tensor at every step.
"""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from expe_edge.runtime.cache import Cache

#: Masks of steps of one token are an odd number of these long, and those of other runs an even one: onnxruntime looks
#: plans up by the exclusive or of all sizes, in which the tokens of a run, named by two inputs, cancel out.
UNIT = 32


def rounded(longest: int, tokens: int) -> int:
    """Return how long to make the mask of a run of `tokens` after which the longest row has `longest`."""
    offset = UNIT if tokens == 1 else 0
    return -(-(longest - offset) // (2 * UNIT)) * 2 * UNIT + offset


class Mask:
    """The attention mask of runs of one shape, (B, total_sequence) int64, as long as the longest row.

    For devices, which copy what is bound, and caches whose own shapes grow.
    """

    def __init__(self, cache: Cache, tokens: int) -> None:
        self.cache, self.tokens = cache, tokens

    def bind(self, binding: ort.IOBinding, longest: int) -> None:
        """Bind the mask of the run to come, after which the longest row has `longest` tokens."""
        self._bind(binding, self.cache.mask(self.tokens, longest))

    def _bind(self, binding: ort.IOBinding, mask: np.ndarray) -> None:
        self.value = ort.OrtValue.ortvalue_from_numpy(mask)  # it holds the memory until the next one
        binding.bind_ortvalue_input("attention_mask", self.value)


class RoundedMask(Mask):
    """The same in memory that is bound once for as many runs as its length holds.

    It changes in Python's integers, as `Storage.advance` counts.
    """

    def __init__(self, cache: Cache, tokens: int) -> None:
        super().__init__(cache, tokens)
        self.columns = 0
        self.held: list[int] = []  # of every row, the run's own included
        self.cells = memoryview(b"")  # of all rows

    def bind(self, binding: ort.IOBinding, longest: int) -> None:
        held = [length + self.tokens for length in self.cache.lengths.tolist()]
        columns = min(rounded(longest, self.tokens), self.cache.columns)
        if columns != self.columns:
            mask = self.cache.mask(self.tokens, columns)
            self.columns, self.cells = columns, mask.reshape(-1).data
            self._bind(binding, mask)
        else:
            for row, (before, now) in enumerate(zip(self.held, held, strict=True)):
                for column in range(min(before, now), max(before, now)):
                    self.cells[row * columns + column] = int(before < now)
        self.held = held
