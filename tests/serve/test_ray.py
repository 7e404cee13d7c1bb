"""The example for several machines, with two replicas on this one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

import expe_edge
from expe_edge.runtime import Generator, PackageSession, Sampling
from tests.command_line import free_port

ROOT = Path(expe_edge.__file__).parents[1]
pytestmark = pytest.mark.skipif(
    find_spec("ray") is None, reason="the example runs where pip install 'ray[serve]' was done; no extra of ours has it"
)


@pytest.fixture
def address(packages: Path, tmp_path: Path) -> Iterator[str]:
    """The address of two replicas, once they answer."""
    port, log = free_port(), tmp_path / "log"
    line = [sys.executable, ROOT / "examples" / "ray_serve.py", packages / "float32", 2, port]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with log.open("w") as said:
        process = subprocess.Popen(
            [str(part) for part in line], stdout=said, stderr=said, env={**os.environ, **environment}
        )
        try:
            yield wait_for(f"http://127.0.0.1:{port}", process, log)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> str:
    while True:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{address}/health").status_code == 200:
                return address
        except httpx.TransportError:
            pass
        time.sleep(0.2)


def test_two_replicas_give_the_answers_of_the_generator(packages: Path, address: str) -> None:
    generator = Generator(PackageSession.load(packages / "float32", threads=1), prefill_chunk=32)
    prompts = [f"the tree {index}" for index in range(40)]
    expected = [
        generator.generate([prompt], max_new_tokens=40, sampling=Sampling(temperature=1.0, seed=index))[0]
        for index, prompt in enumerate(prompts)
    ]

    def ask(index: int) -> str:
        body = {"prompt": prompts[index], "max_tokens": 40, "seed": index}
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()
        return str(answer["choices"][0]["text"])

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(40)))
    pages = [httpx.get(f"{address}/metrics").text for _ in range(60)]
    counts = {re.findall(r"^expe_edge_generated_tokens_total (\S+)$", page, flags=re.MULTILINE)[0] for page in pages}

    assert texts == [one.text for one in expected]
    assert len(counts) == 2  # of either replica
    assert sum(map(float, counts)) == sum(len(one.tokens) for one in expected)
