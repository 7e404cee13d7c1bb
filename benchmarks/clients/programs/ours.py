"""This project's generator: rows that decode together, and a context that is read on and rewound."""

from __future__ import annotations

from typing import Any

from benchmarks.clients.programs.protocol import answer
from expe_edge.runtime import Generator


class Ours:
    """A package in this project's generator, greedy."""

    def __init__(self, package: str) -> None:
        self.generator = Generator.load(package, threads=1)

    def complete(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Complete prompts of any lengths together."""
        return {"tokens": [done.tokens for done in self.generator.generate(prompts, max_new_tokens=new)]}

    def go_on(self, prompt: list[int], new: int, keep: int, more: list[int]) -> dict[str, Any]:
        """Generate behind a prompt, keep the first tokens of it all, read more and generate again."""
        context = self.generator.context(prompt)
        first = self._stream(context, new)
        sequence = prompt + first
        context.rewind(min(keep, len(context)))  # it holds all but the last token
        context.append(sequence[len(context) : keep] + more)
        return {"tokens": [first, self._stream(context, new)]}

    def _stream(self, context: Any, new: int) -> list[int]:
        stream = self.generator.stream(None, context=context, max_new_tokens=new)
        for _ in stream:
            pass
        tokens: list[int] = stream.completion.tokens
        return tokens


if __name__ == "__main__":
    answer(Ours)
