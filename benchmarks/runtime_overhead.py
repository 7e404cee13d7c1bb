"""What the runtime's own Python costs: its share of a decode step of the `small` preset, by what is asked for.

    python -m benchmarks.runtime_overhead

Times every call into onnxruntime while a stream is read and reports the rest as the runtime's share, with median and
quartiles over steps. Time is the processor time of the thread that decodes, which other programs do not add to. All
ways go round and round, a few steps each, so that a slow moment of the machine meets all of them. The weights are those
of one training step: speed does not depend on them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime as ort

from benchmarks.untrained import untrained_package
from expe_edge.runtime import Constraint, Generator, Sampling


class TimedSession:
    """An onnxruntime session that remembers when each run began and ended, in the thread's processor time."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.runs: list[tuple[float, float]] = []

    def io_binding(self) -> ort.IOBinding:
        return self.session.io_binding()

    def run_with_iobinding(self, binding: ort.IOBinding) -> None:
        began = time.thread_time()
        self.session.run_with_iobinding(binding)
        self.runs.append((began, time.thread_time()))


# After one training step logits are nearly flat; so low a temperature makes them as peaked as a trained model's.
PEAKED: dict[str, Any] = {"temperature": 0.05, "seed": 0}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top-p": {"sampling": Sampling(**PEAKED, top_p=0.9)},
    "top-k": {"sampling": Sampling(**PEAKED, top_k=40)},
    "top-k, top-p, min-p, repetition": {
        "sampling": Sampling(**PEAKED, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1)
    },
    "typical": {"sampling": Sampling(**PEAKED, typical_p=0.9)},
    "mirostat": {"sampling": Sampling(**PEAKED, mirostat_tau=3.0)},
    "penalties and bias, greedy": {
        "sampling": Sampling(frequency_penalty=0.5, presence_penalty=0.5, logit_bias={5: 1.0, 9: -100.0})
    },
    "5 log probabilities, greedy": {"logprobs": 5},
    "regex, greedy": {"constraint": Constraint(regex=r"([a-z]+ )+")},
    "schema, top-p": {
        "sampling": Sampling(**PEAKED, top_p=0.9),
        "constraint": Constraint(json_schema={"type": "array", "items": {"type": "string"}, "minItems": 1000}),
    },
}


def decode_some(generator: Generator, context: int, steps: int, way: dict[str, Any]) -> np.ndarray:
    """Decode `steps` tokens after `context`; return seconds of each in all, and within onnxruntime, (2, steps).

    A step is from one run's beginning to the next one's.
    """
    prompt = np.random.default_rng(0).integers(generator.session.contract.vocab_size, size=context).tolist()
    timed = generator.session.session
    timed.runs.clear()
    for _ in generator.stream(prompt, max_new_tokens=steps + 2, **way):  # prefill gives the first token
        pass
    began, ended = np.array(timed.runs[-steps - 1 :]).T
    return np.array([np.diff(began), (ended - began)[:-1]])


def summary(times: np.ndarray) -> dict[str, float]:
    """Return medians and quartiles of steps (2, n)."""
    total, inside = times
    share = 1 - inside / total
    return {
        "step_ms_median": float(np.median(total) * 1e3),
        "own_us_median": float(np.median(total - inside) * 1e6),
        "own_share_median": float(np.median(share)),
        "own_share_q1": float(np.quantile(share, 0.25)),
        "own_share_q3": float(np.quantile(share, 0.75)),
    }


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/runtime_overhead"), show_default=True)
@click.option("--package", type=click.Path(path_type=Path), help="Measure this one, and make none.")
@click.option("--preset", default="small", show_default=True)
@click.option("--precision", default="int8-dynamic", show_default=True)
@click.option("--context", default=512, show_default=True)
@click.option("--steps", default=40, show_default=True, help="Of each way in each round.")
@click.option("--rounds", default=5, show_default=True)
def main(out: Path, package: Path | None, preset: str, precision: str, context: int, steps: int, rounds: int) -> None:
    """Print, as JSON lines, the share of a decode step spent in the runtime's own Python."""
    generator = Generator.load(package or untrained_package(out, preset, precision))
    generator.vocabulary  # noqa: B018  # made once for all constraints
    generator.end_of_text = None  # as many tokens as are asked for, whatever they are
    generator.session.session = TimedSession(generator.session.session)
    times: dict[str, list[np.ndarray]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            times[name].append(decode_some(generator, context, steps, way))
    for name, parts in times.items():
        print(json.dumps({"way": name, "context": context, **summary(np.concatenate(parts, axis=1))}))


if __name__ == "__main__":
    main()
