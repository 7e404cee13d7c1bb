"""onnxruntime-genai's Python API: a generator that tokens are appended to, and its own loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime_genai as og

from benchmarks.clients.programs.protocol import answer


class GenAI:
    """A package in onnxruntime-genai, greedy."""

    def __init__(self, package: str) -> None:
        self.model = og.Model(package)

    def complete(self, prompts: list[list[int]], new: int, *, left: bool = False) -> dict[str, Any]:
        """Complete prompts of any lengths together, padded on the right, as its tokenizer pads, or on the left."""
        longest = max(map(len, prompts))
        padding = [[0] * (longest - len(prompt)) for prompt in prompts]
        rows = [before + prompt if left else prompt + before for before, prompt in zip(padding, prompts, strict=True)]
        generator = self._generator(longest + new, len(rows))
        generator.append_tokens(np.array(rows, dtype=np.int32))
        self._generate(generator, new)
        return {"tokens": [self._sequence(generator, row)[longest:] for row in range(len(rows))]}

    def go_on(self, prompt: list[int], new: int, keep: int, more: list[int]) -> dict[str, Any]:
        """Generate behind a prompt, rewind, append and generate again.

        The token that was generated last is in no cache yet, and a cache that grows is not rewound to where it ends: so
        two tokens at least are rewound, and appended again.
        """
        generator = self._generator(len(prompt) + 2 * new + len(more))
        generator.append_tokens(np.array([prompt], dtype=np.int32))
        self._generate(generator, new)
        sequence = self._sequence(generator)
        held = min(keep, len(sequence) - 2)
        generator.rewind_to(held)
        generator.append_tokens(np.array([sequence[held:keep] + more], dtype=np.int32))
        self._generate(generator, new)
        return {"tokens": [sequence[len(prompt) :], self._sequence(generator)[keep + len(more) :]]}

    def append_twice(self, prompt: list[int], new: int, keep: int, more: list[int]) -> dict[str, Any]:
        """The same without rewinding: what was generated last is never read."""
        generator = self._generator(len(prompt) + 2 * new + len(more))
        generator.append_tokens(np.array([prompt], dtype=np.int32))
        self._generate(generator, new)
        sequence = self._sequence(generator)
        generator.append_tokens(np.array([more], dtype=np.int32))
        self._generate(generator, new)
        return {"tokens": [sequence[len(prompt) :], self._sequence(generator)[keep + len(more) :]]}

    def _generator(self, length: int, rows: int = 1) -> Any:
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(do_sample=False, max_length=length, batch_size=rows)
        return og.Generator(self.model, parameters)

    @staticmethod
    def _generate(generator: Any, new: int) -> None:
        for _ in range(new):
            if generator.is_done():
                break
            generator.generate_next_token()

    @staticmethod
    def _sequence(generator: Any, row: int = 0) -> list[int]:
        return [int(token) for token in generator.get_sequence(row)]


if __name__ == "__main__":
    answer(GenAI)
