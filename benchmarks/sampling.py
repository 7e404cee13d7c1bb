"""What choosing a token costs, by settings and vocabulary: of the reference model's logits, and of 32,000 like them.

    python -m benchmarks.sampling

Prints the median microseconds of a choice, alone (`warm`) and where 24 MB have been read since the last one (`cold`),
as a decode step does. Time is the thread's processor time.
"""

from __future__ import annotations

import json
import time
from typing import Any

import click
import numpy as np

from expe_edge.runtime import Generator, Sampling
from expe_edge.runtime.sampling import Sampler

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "top-k": {"temperature": 0.8, "top_k": 40},
    "min-p": {"temperature": 0.8, "min_p": 0.05},
    "top-k, top-p, min-p, repetition": {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
    },
    "typical": {"temperature": 0.8, "typical_p": 0.9},
    "mirostat": {"temperature": 0.8, "mirostat_tau": 3.0},
    "penalties and bias": {"frequency_penalty": 0.5, "presence_penalty": 0.5, "logit_bias": {5: 1.0}},
}
#: What a step reads, in float64.
READ = 3_000_000


def microseconds(sampling: Sampling, logits: np.ndarray, times: int, read: np.ndarray | None) -> float:
    """Return the median time of a choice."""
    sampler, taken = Sampler(sampling, np.arange(5), len(logits)), []
    for _ in range(times):
        if read is not None:
            read += 1
        began = time.thread_time_ns()
        sampler.choose(logits)
        taken.append((time.thread_time_ns() - began) / 1e3)
    return float(np.median(taken))


@click.command()
@click.option("--times", default=200, show_default=True)
def main(times: int) -> None:
    """Print, as JSON lines, what a choice costs."""
    generator = Generator.load(threads=1)
    prompt = generator.encode("def read_json(path):\n    with open(")
    (logits,) = (logits[-1].copy() for logits in generator.session.forward([prompt]))
    common = logits[logits < np.quantile(logits, 0.9)]
    more = np.random.default_rng(0).choice(common, 32_000 - len(logits)).astype(np.float32)
    read = np.zeros(READ)
    for scores in (logits, np.concatenate([logits, more])):
        for name, settings in SETTINGS.items():
            sampling = Sampling(**settings, seed=0)
            warm, cold = (microseconds(sampling, scores, times, each) for each in (None, read))
            print(json.dumps({"settings": name, "vocabulary": len(scores), "warm_us": warm, "cold_us": cold}))


if __name__ == "__main__":
    main()
