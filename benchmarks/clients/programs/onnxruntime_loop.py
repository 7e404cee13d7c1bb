"""onnxruntime, used as its documentation has it: a session, and a loop that hands the present on as the past.

Needs NumPy and onnxruntime alone, of any release.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.clients.programs.protocol import answer

DTYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8}


class Loop:
    """A package and a loop of one's own, greedy."""

    def __init__(self, package: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(f"{package}/model.onnx", options, providers=["CPUExecutionProvider"])
        self.pasts = [node for node in self.session.get_inputs() if node.name.startswith("past_key_values")]

    def complete(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Complete prompts of any lengths together, padded on the left."""
        longest = max(map(len, prompts))
        ids = np.array([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = np.array([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return {"tokens": self._decode(self._empty(len(prompts)), mask, ids, new)[0]}

    def go_on(self, prompt: list[int], new: int, keep: int, more: list[int]) -> dict[str, Any]:
        """Generate behind a prompt, keep the first tokens of it all, read more and generate again."""
        first, cache = self._decode(self._empty(1), np.ones((1, len(prompt))), np.array([prompt]), new)
        held = min(keep, len(prompt) + new - 1)  # the last token is in no cache yet
        cache = [past[:, :, :held] for past in cache]
        unread = np.array([(prompt + first[0])[held:keep] + more])
        second, _ = self._decode(cache, np.ones((1, keep + len(more))), unread, new)
        return {"tokens": [first[0], second[0]]}

    def go_on_behind_zeros(self, prompt: list[int], new: int, keep: int, more: list[int]) -> dict[str, Any]:
        """The same where all is kept, but with zeros in place of what the last token's keys and values would be."""
        first, cache = self._decode(self._empty(1), np.ones((1, len(prompt))), np.array([prompt]), new)
        cache = [np.pad(past, ((0, 0), (0, 0), (0, 1), (0, 0))) for past in cache]
        second, _ = self._decode(cache, np.ones((1, keep + len(more))), np.array([more]), new)
        return {"tokens": [first[0], second[0]]}

    def _empty(self, rows: int) -> list[np.ndarray]:
        return [np.zeros((rows, node.shape[1], 0, node.shape[3]), DTYPES[node.type]) for node in self.pasts]

    def _decode(
        self, cache: list[np.ndarray], mask: np.ndarray, ids: np.ndarray, new: int
    ) -> tuple[list[list[int]], list[np.ndarray]]:
        """Read ids (B, T) behind a cache, and generate; mask: (B, S), of all tokens. Returns tokens, and the cache."""
        chosen = []
        for _ in range(new):
            positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
            feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            pasts = {node.name: past for node, past in zip(self.pasts, cache, strict=True)}
            feeds = {name: np.asarray(value, dtype=np.int64) for name, value in feeds.items()} | pasts
            logits, *cache = self.session.run(None, feeds)
            ids = logits[:, -1].argmax(axis=-1)[:, None]
            mask = np.concatenate([mask, np.ones((len(ids), 1))], axis=1)
            chosen.append(ids[:, 0])
        return np.stack(chosen, axis=1).tolist(), cache


if __name__ == "__main__":
    answer(Loop)
