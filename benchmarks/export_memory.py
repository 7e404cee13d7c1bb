"""Peak memory of making packages of a large model: 134 million parameters, 32,000 tokens.

    python -m benchmarks.export_memory

Each command runs in a process of its own, whose largest resident set is read when it ends. The weights are those of
one training step: what a package takes to make does not depend on them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click

from expe_edge.speed.measuring import RSS_UNIT

MODEL = (
    *("--preset", "base", "--num-key-value-heads", "12", "--no-tie-word-embeddings", "--vocab-size", "32000"),
    *("--data", "python-stdlib", "--training-length", "128", "--batch-size", "1", "--max-steps", "1"),
)
#: What is measured, by the options of `export`.
EXPORTS = {
    "float32": ("--precision", "float32"),
    "int8-dynamic, rtn": ("--precision", "int8-dynamic", "--solver", "rtn"),
    "int8-dynamic, gptq": ("--precision", "int8-dynamic", "--solver", "gptq"),
    "int8-static, rtn": ("--precision", "int8-static", "--solver", "rtn"),
    "int4-weight, rtn": ("--precision", "int4-weight", "--solver", "rtn"),
}


def run(*arguments: str) -> int:
    """Run a command of expe-edge; return its largest resident set in bytes."""
    process = subprocess.Popen([sys.executable, "-m", "expe_edge", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"expe-edge {' '.join(arguments)} ended with {process.returncode}")
    return usage.ru_maxrss * RSS_UNIT


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/export-memory"), show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(EXPORTS)), help="Measure these alone.")
def main(out: Path, only: tuple[str, ...]) -> None:
    checkpoint = out / "checkpoint"
    if not (checkpoint / "model.safetensors").is_file():
        run("train", *MODEL, "--out", str(checkpoint), "--force")
    peaks = {}
    for name in only or EXPORTS:
        peaks[name] = run("export", str(checkpoint), *EXPORTS[name], "--out", str(out / "packages"), "--force")
        click.echo(f"{name}: {peaks[name] / 1e9:.2f} GB")
    (out / "export-memory.json").write_text(json.dumps(peaks, indent=2))


if __name__ == "__main__":
    main()
