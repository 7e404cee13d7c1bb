"""Packages of models that have learned next to nothing: what they cost to run does not depend on it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run(*arguments: str) -> None:
    """Run a command of expe-edge."""
    subprocess.run([sys.executable, "-m", "expe_edge", *arguments], check=True)


def make_checkpoint(out: Path, options: Sequence[str]) -> Path:
    """Train one step with these options of `train`, unless that is there; return the checkpoint."""
    if not (out / "model.safetensors").is_file():
        run("train", *options, "--max-steps", "1", "--batch-size", "1", "--out", str(out), "--force")
    return out


def make_packages(checkpoint: Path, out: Path, precisions: Sequence[str], options: Sequence[str] = ()) -> None:
    """Export a checkpoint in every precision with these options of `export`, weights rounded to nearest."""
    asked = [part for precision in precisions for part in ("--precision", precision)]
    # Ranges of an int8 cache are measured on so few texts: what they are makes no difference to speed.
    run("export", str(checkpoint), *asked, "--solver", "rtn", "--calibration-windows", "2", *options, "--out", str(out))


def untrained_package(out: Path, preset: str, precision: str) -> Path:
    """Return a package of a preset of `train`, made unless it is there."""
    checkpoint, packages = make_checkpoint(out / preset, ("--preset", preset)), out / f"{preset}-package"
    if not (packages / precision).is_dir():
        make_packages(checkpoint, packages, [precision])
    return packages / precision
