"""Whether rows that run together get the bits of rows alone: tried, since it depends on kernels and processors."""

from __future__ import annotations

import numpy as np

from expe_edge.runtime import PackageSession
from expe_edge.runtime.session import Step

#: Rows and steps of the trial, and the longest text of a row; fewer where the encoding has fewer positions.
ROWS, STEPS, LONGEST = 16, 8, 96


def rows_are_independent(session: PackageSession, rows: int) -> bool:
    """Say whether decoding random rows together gives the very logits of decoding each by itself.

    It does not where rows of a run share the activations' range (int8-dynamic), where the kernel of one row computes
    otherwise than that of several (int8-weight), or where padding between rows changes the order of sums.

    rows: that will run together at most.
    """
    random, count = np.random.default_rng(0), min(rows, ROWS)
    if count == 1:
        return True
    vocab_size, capacity = session.contract.vocab_size, min(LONGEST + STEPS, session.reach)
    steps = min(STEPS, capacity // 2)
    lengths = random.integers(1, max(2, capacity - steps), count).tolist()
    cache = session.new_cache(count, capacity)
    for index, length in enumerate(lengths):
        for _ in session.prefill(cache.row(index), random.integers(vocab_size, size=length), last=True):
            pass
    alone = [Step(session, cache.row(index), 1) for index in range(count)]
    together = Step(session, cache, 1)
    for step in range(steps):
        tokens = random.integers(vocab_size, size=(count, 1))
        expected = np.concatenate([one.run(tokens[[index]]).copy() for index, one in enumerate(alone)])
        for index, length in enumerate(lengths):
            cache.row(index).truncate(length + step)
        if not np.array_equal(together.run(tokens), expected):
            return False
    return True
