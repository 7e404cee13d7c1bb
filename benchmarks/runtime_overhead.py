"""What the runtime's own Python costs: its share of a decode step of the `small` preset.

    python -m benchmarks.runtime_overhead

Times every call into onnxruntime while a stream is read and reports the rest as the runtime's share, with median and
quartiles over steps. The weights are those of one training step: speed does not depend on them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import onnxruntime as ort

from expe_edge.runtime import Generator, Sampling


def make_package(out: Path, preset: str, precision: str) -> Path:
    """Train one step of `preset` and export it, unless that is there."""
    checkpoint, package = out / preset, out / f"{preset}-package"
    expe_edge = [sys.executable, "-m", "expe_edge"]
    if not (checkpoint / "model.safetensors").is_file():
        command = ["train", "--preset", preset, "--max-steps", "1", "--batch-size", "1", "--out", str(checkpoint)]
        subprocess.run([*expe_edge, *command, "--force"], check=True)
    if not (package / precision).is_dir():
        command = ["export", str(checkpoint), "--precision", precision, "--out", str(package)]
        subprocess.run([*expe_edge, *command], check=True)
    return package / precision


class TimedSession:
    """An onnxruntime session that remembers when each run began and ended."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.runs: list[tuple[float, float]] = []

    def io_binding(self) -> ort.IOBinding:
        return self.session.io_binding()

    def run_with_iobinding(self, binding: ort.IOBinding) -> None:
        began = time.perf_counter()
        self.session.run_with_iobinding(binding)
        self.runs.append((began, time.perf_counter()))


def measure(package: Path, context: int, steps: int, sampling: Sampling) -> dict[str, float]:
    """Decode `steps` tokens after `context`; return seconds per step and the share outside onnxruntime.

    A step is from one run's beginning to the next one's.
    """
    generator = Generator.load(package)
    generator.end_of_text = None  # as many tokens as are asked for, whatever they are
    prompt = np.random.default_rng(0).integers(generator.session.contract.vocab_size, size=context).tolist()
    generator.session.session = timed = TimedSession(generator.session.session)
    for _ in generator.stream(prompt, max_new_tokens=steps + 2, sampling=sampling):  # prefill gives the first token
        pass
    began, ended = np.array(timed.runs[-steps - 1 :]).T
    total, inside = np.diff(began), (ended - began)[:-1]
    share = 1 - inside / total
    return {
        "context": context,
        "step_ms_median": float(np.median(total) * 1e3),
        "own_us_median": float(np.median(total - inside) * 1e6),
        "own_share_median": float(np.median(share)),
        "own_share_q1": float(np.quantile(share, 0.25)),
        "own_share_q3": float(np.quantile(share, 0.75)),
    }


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/runtime_overhead"), show_default=True)
@click.option("--preset", default="small", show_default=True)
@click.option("--precision", default="int8-dynamic", show_default=True)
@click.option("--steps", default=200, show_default=True)
def main(out: Path, preset: str, precision: str, steps: int) -> None:
    """Print, as JSON lines, the share of a decode step spent in the runtime's own Python."""
    package = make_package(out, preset, precision)
    # After one training step logits are nearly flat; so low a temperature makes them as peaked as a trained model's.
    for name, sampling in (("greedy", Sampling()), ("sampled", Sampling(temperature=0.05, top_p=0.9, seed=0))):
        for context in (512, 4096):
            print(json.dumps({"sampling": name, **measure(package, context, steps, sampling)}))


if __name__ == "__main__":
    main()
