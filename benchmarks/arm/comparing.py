"""A package here and on Arm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.arm import reading
from benchmarks.arm.system import System
from expe_edge.divergence import divergence

#: All that qemu has, i8mm and SVE among it; dot products; neither.
PROCESSORS = ("max", "cortex-a76", "cortex-a53")


class Comparison(NamedTuple):
    """kl: mean nats a token. largest: difference of logits. same: greedy tokens before another, of `written`."""

    kl: float
    largest: float
    same: int
    written: int


def compare(system: System, path: Path, processor: str) -> Comparison:
    """Run a package here and there."""
    module = [reading.__file__, str(path.absolute())]
    here = subprocess.run([sys.executable, *module], env=os.environ, capture_output=True, text=True, check=True).stdout
    ours, theirs = (json.loads(output.splitlines()[-1]) for output in (here, system.run(module, processor)))
    expected, found = (np.array(each["logits"], dtype=np.float32) for each in (ours, theirs))
    pairs = list(zip(ours["tokens"], theirs["tokens"], strict=True))
    same = next((index for index, (one, other) in enumerate(pairs) if one != other), len(pairs))
    largest = float(np.abs(expected - found).max())
    return Comparison(float(divergence(expected, found).mean()), largest, same, len(pairs))
