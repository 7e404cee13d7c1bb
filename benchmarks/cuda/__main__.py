"""Packages for GPUs on a GPU: parity, speed by depth, memory, and PyTorch's figures for the same model beside them.

    python -m benchmarks.cuda demo/checkpoint --out cuda.json

`--device cpu` runs the same on the CPU, by the same way through onnxruntime's bindings.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime as ort
import torch
from transformers.cache_utils import DynamicCache

from expe_edge.divergence import divergence
from expe_edge.export.exporter import export
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.quant.recipe import Recipe
from expe_edge.runtime import Generator, PackageSession
from expe_edge.runtime.device import Device
from expe_edge.runtime.session import Step
from expe_edge.text.tokenization import encode_documents
from expe_edge.training.checkpoint import Checkpoint, load_checkpoint

PRECISIONS = ("float32", "float16", "int8-weight", "int4-weight")
#: Tokens that are generated for comparison, and runs whose median is the time of one.
GENERATED, RUNS = 64, 20
#: Seconds after which what is left is left out.
BUDGET = 420
Ids = np.ndarray[Any, np.dtype[np.int64]]


def opened(path: Path, device: Device) -> Generator:
    """Open a package on a device; on the CPU with caches in bound memory, as on a GPU."""
    session = PackageSession.load(path, device=f"cuda:{device.index}" if device.kind == "cuda" else "cpu")
    session.device = device
    generator = Generator(session)
    generator.end_of_text = None
    return generator


def logits_of(generator: Generator, tokens: Ids) -> np.ndarray[Any, Any]:
    """Return logits (T, V) of a text that is read in chunks, its last 16 tokens one by one."""
    session = generator.session
    cache = session.new_cache(1, len(tokens))
    found = [part.copy() for part in session.prefill(cache, tokens[:-16])]
    step = Step(session, cache, 1)
    return np.concatenate(found + [step.run(token[None, None])[0].copy() for token in tokens[-16:]])


def median_seconds(run: Callable[[], object], runs: int = RUNS) -> float:
    """Return the median time of a run, the first two not counted."""
    taken = []
    for _ in range(runs + 2):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken[2:]))


def speeds(session: PackageSession, depth: int, prefill: int) -> dict[str, float]:
    """Return tokens a second behind `depth` others, of a prompt and of decoding."""
    vocabulary = session.contract.vocab_size
    tokens = np.random.default_rng(0).integers(1, vocabulary, depth + prefill)
    cache = session.new_cache(1, depth + prefill + RUNS + 2)
    cache.reserve(depth + prefill + RUNS + 2)
    for _ in session.prefill(cache, tokens[:depth], last=True):
        pass

    def read() -> None:
        for _ in session.prefill(cache, tokens[depth:], last=True):
            pass
        cache.truncate(depth)

    reading = median_seconds(read, 3)
    step = Step(session, cache, 1)
    decoding = median_seconds(lambda: step.run(tokens[None, :1]))
    return {"prefill": prefill / reading, "decode": 1 / decoding}


def used_memory() -> int | None:
    """Return the bytes that are taken of the first GPU; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return int(found.split()[0]) * 2**20


def torch_speeds(checkpoint: Checkpoint, device: str, depth: int, prefill: int, *, compiled: bool) -> dict[str, float]:
    """Return PyTorch's tokens a second, in float16 on a GPU, eagerly or by `torch.compile`."""
    model: ExPEForCausalLM = checkpoint.model.to(device)
    forward: Any = torch.compile(model) if compiled else model
    tokens = torch.randint(1, model.config.vocab_size, (1, depth + prefill), device=device)
    half = torch.autocast(device, dtype=torch.float16, enabled=device == "cuda")

    def done() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode(), half:
        cache = DynamicCache()
        model(input_ids=tokens[:, : max(depth, 1)], past_key_values=cache, logits_to_keep=1)

        def read() -> None:
            forward(input_ids=tokens[:, depth:], use_cache=False, logits_to_keep=1)
            done()

        def step() -> None:
            forward(input_ids=tokens[:, :1], past_key_values=cache, logits_to_keep=1)
            done()

        return {"prefill": prefill / median_seconds(read, 3), "decode": 1 / median_seconds(step, 10)}


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--device", default="cuda", show_default=True, type=click.Choice(["cuda", "cpu"]))
@click.option("--depths", default="0,1024,4096", show_default=True)
@click.option("--prefill", default=512, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write all figures there, as JSON.")
def main(checkpoint: Path, device: str, depths: str, prefill: int, out: Path | None) -> None:
    """Print, for every precision, parity with the CPU's float32 package, then speed and memory by depth."""
    began, where, model = time.monotonic(), Device(device), load_checkpoint(checkpoint)
    stream = np.concatenate(encode_documents(model.tokenizer, model.corpus().held_out)).astype(np.int64)
    tokens = stream[: 4 * model.config.training_length]
    versions = {"onnxruntime": ort.__version__, "torch": str(torch.__version__)}
    figures: dict[str, Any] = {"device": device, "versions": versions}
    with tempfile.TemporaryDirectory() as directory:
        recipes = [Recipe(name, solver="rtn" if "int" in name else None, device="cuda") for name in PRECISIONS]
        plain, *packages = export(checkpoint, Path(directory), [Recipe(), *recipes])
        reference = opened(plain.path, Device())
        expected = logits_of(reference, tokens)
        greedy = reference.generate([tokens[:32].tolist()], max_new_tokens=GENERATED)[0].tokens
        for name, package in zip(PRECISIONS, packages, strict=True):
            before = used_memory()
            generator = opened(package.path, where)
            found = logits_of(generator, tokens)
            written = generator.generate([tokens[:32].tolist()], max_new_tokens=GENERATED)[0].tokens
            same = next((i for i, pair in enumerate(zip(greedy, written, strict=True)) if len({*pair}) > 1), GENERATED)
            row: dict[str, Any] = {
                "largest_difference": float(np.abs(found - expected).max()),
                "mean_kl": float(divergence(expected, found).mean()),
                "same_tokens": same,
            }
            print(
                f"{name}: KL {row['mean_kl']:.2g}, logits off by {row['largest_difference']:.2g}, {same} tokens alike"
            )
            for depth in map(int, depths.split(",")):
                if time.monotonic() - began > BUDGET:
                    print(f"{name}, {depth}: left out, the time is over")
                    continue
                row[str(depth)] = speeds(generator.session, depth, prefill)
                report(name, depth, row[str(depth)])
            after = used_memory()
            row["memory_bytes"] = None if before is None or after is None else after - before
            figures[name] = row
    for compiled in (False, True):
        name = "torch.compile" if compiled else "torch"
        for depth in map(int, depths.split(",")):
            if time.monotonic() - began > BUDGET:
                print(f"{name}, {depth}: left out, the time is over")
                continue
            figures.setdefault(name, {})[str(depth)] = found_speeds = torch_speeds(
                model, device, depth, prefill, compiled=compiled
            )
            report(name, depth, found_speeds)
    print(f"{time.monotonic() - began:.0f} s")
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def report(name: str, depth: int, found: dict[str, float]) -> None:
    """Print one line."""
    print(f"{name}, behind {depth} tokens: prompt {found['prefill']:,.0f}, decoding {found['decode']:,.0f} tokens/s")


if __name__ == "__main__":
    main()
