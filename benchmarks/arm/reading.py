"""What packages compute, a line of JSON for each: run on either processor by `benchmarks.arm`."""

from __future__ import annotations

import json
import sys

import numpy as np

from expe_edge.runtime import Generator

TOKENS, DECODED, WRITTEN = 96, 16, 24


def main(path: str) -> None:
    """Print the greedy tokens behind a text, and the logits of its last tokens, which are read one by one."""
    generator = Generator.load(path, threads=1, graph_cache="off", kernels="off")
    session = generator.session
    tokens = np.random.default_rng(0).integers(1, session.contract.vocab_size, TOKENS)
    cache = session.new_cache(1, TOKENS)
    logits = [*session.prefill(cache, tokens[:-DECODED], 40)][-1][-1:].tolist()
    for token in tokens[-DECODED:]:
        logits += next(session.prefill(cache, token[None])).tolist()
    generator.end_of_text = None
    written = generator.generate([tokens.tolist()], max_new_tokens=WRITTEN)[0].tokens
    print(json.dumps({"tokens": written, "logits": logits}))


if __name__ == "__main__":
    for package in sys.argv[1:]:
        main(package)
