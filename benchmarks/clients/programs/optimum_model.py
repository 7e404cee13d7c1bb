"""Optimum's ORTModelForCausalLM, whose loop is transformers' `generate`."""

from __future__ import annotations

from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM

from benchmarks.clients.programs.protocol import answer


class Optimum:
    """A package in Optimum, greedy where nothing else is said."""

    def __init__(self, package: str) -> None:
        self.model = ORTModelForCausalLM.from_pretrained(package)

    def complete(self, prompts: list[list[int]], new: int, **settings: Any) -> dict[str, Any]:
        """Complete prompts of any lengths together, padded on the left, as its tokenizer is told to."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = self._generate(ids, new, attention_mask=mask, **settings)
        return {"tokens": output.sequences[:, longest:].tolist()}

    def go_on(self, prompt: list[int], new: int, keep: int, more: list[int]) -> dict[str, Any]:
        """Generate behind a prompt, cut the cache, and generate again from it behind all tokens."""
        first = self._generate(torch.tensor([prompt]), new)
        sequence = first.sequences[0].tolist()
        held = min(keep, len(sequence) - 1)
        past = tuple(tuple(part[:, :, :held] for part in layer) for layer in first.past_key_values)
        ids = torch.tensor([sequence[:keep] + more])
        second = self._generate(ids, new, past_key_values=past)
        return {"tokens": [sequence[len(prompt) :], second.sequences[0, ids.shape[1] :].tolist()]}

    def assisted(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Complete with a model drafting: the same, whose drafts are all taken."""
        return self.complete(prompts, new, assistant_model=self.model)

    def _generate(self, ids: torch.Tensor, new: int, **settings: Any) -> Any:
        settings.setdefault("attention_mask", torch.ones_like(ids))
        return self.model.generate(
            ids, max_new_tokens=new, max_length=None, do_sample=False, return_dict_in_generate=True, **settings
        )


if __name__ == "__main__":
    answer(Optimum)
