"""lm-evaluation-harness with this project's model class, asked as its tasks ask; it speaks text, not tokens."""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance

from benchmarks.clients.programs.protocol import answer
from expe_edge.quality.harness import PackageLM


class Harness:
    """A package in lm-evaluation-harness, greedy."""

    def __init__(self, package: str) -> None:
        self.package = package

    def complete(self, texts: list[str], new: int) -> dict[str, Any]:
        """Complete texts together."""
        model = PackageLM(self.package, batch_size=len(texts), threads=1)
        settings = {"until": [], "max_gen_toks": new, "do_sample": False}
        requests = [
            Instance(request_type="generate_until", doc={}, arguments=(text, settings), idx=index)
            for index, text in enumerate(texts)
        ]
        return {"texts": model.generate_until(requests)}


if __name__ == "__main__":
    answer(Harness)
