"""A package here and on Arm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


def compare(system: System, paths: Sequence[Path], processor: str) -> list[Comparison]:
    """Run packages here and there."""
    module = [reading.__file__, *(str(path.absolute()) for path in paths)]
    here = subprocess.run([sys.executable, *module], env=os.environ, capture_output=True, text=True, check=True).stdout
    outputs = [[line for line in out.splitlines() if line[:1] == "{"] for out in (here, system.run(module, processor))]
    return [_compared(json.loads(ours), json.loads(theirs)) for ours, theirs in zip(*outputs, strict=True)]


def _compared(ours: dict[str, Any], theirs: dict[str, Any]) -> Comparison:
    expected, found = (np.array(each["logits"], dtype=np.float32) for each in (ours, theirs))
    pairs = list(zip(ours["tokens"], theirs["tokens"], strict=True))
    same = next((index for index, (one, other) in enumerate(pairs) if one != other), len(pairs))
    largest = float(np.abs(expected - found).max())
    return Comparison(float(divergence(expected, found).mean()), largest, same, len(pairs))
