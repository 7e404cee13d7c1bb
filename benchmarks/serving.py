"""A soak of `expe-edge serve`: many clients for minutes, every answer compared with the generator's own.

    python -m benchmarks.serving
    python -m benchmarks.serving demo/package/float32 --minutes 2

The server runs in a process of its own. Clients ask for streams, one after another, of prompts from a few to several
hundred tokens, some with a beginning in common; one in fifty goes away in the middle of an answer. Then the same
clients ask a server that runs one completion at a time, and one whose rows decode one by one, for a shorter time.
Times are taken at the clients, which read the connection themselves: OpenAI's client, which the tests use, takes longer
over a token than a small model.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from expe_edge.package.reference import reference_package
from expe_edge.runtime import Generator, Sampling

#: One request in so many is left before its end.
LEAVING = 50
#: Tokens of prompts and of completions, and of the beginning that a third of the prompts shares.
PROMPTS, COMPLETIONS, SHARED = (8, 700), (16, 128), 160
#: Seconds between two looks at the server's memory, and those at the beginning in which it fills what it keeps.
LOOK, FILLING = 2.0, 60.0
#: As the server reads prompts by default.
CHUNK = 32


@dataclass(frozen=True)
class Work:
    """A request, and the text that the generator answers it with."""

    body: bytes
    text: str
    tokens: int


def make_work(generator: Generator, count: int, seed: int = 0) -> list[Work]:
    """Return requests of all lengths, greedy and sampled, with what the generator makes of each."""
    dice = random.Random(seed)
    source = Path(os.__file__).read_text(encoding="utf-8")
    ids = generator.encode(source).tolist()
    found = []
    for index in range(count):
        length = int(np.exp(dice.uniform(*np.log(PROMPTS))))
        begin = dice.randrange(1, len(ids) - PROMPTS[1])
        shared = ids[1 : SHARED + 1] if index % 3 == 0 else []
        prompt, new = [0, *shared, *ids[begin : begin + length]], dice.randint(*COMPLETIONS)
        sampling = Sampling(temperature=dice.choice((0.0, 0.8, 1.0)), top_p=0.95, seed=index)
        (completion,) = generator.generate([prompt], max_new_tokens=new, sampling=sampling)
        fields = {
            "prompt": prompt,
            "max_tokens": new,
            "temperature": sampling.temperature,
            "top_p": 0.95,
            "seed": index,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        found.append(Work(json.dumps(fields).encode(), completion.text, len(completion.tokens)))
    return found


@dataclass
class Tally:
    """What clients have seen.

    Attributes:
        first: seconds before the first token of every answer. between: those between two others.
        lost: tokens fewer or more than the generator's. different: answers that are not its own. left: answers that
            nobody waited for. failed: requests that were not answered to the end.
    """

    answers: int = 0
    tokens: int = 0
    lost: int = 0
    different: int = 0
    left: int = 0
    failed: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


async def events(port: int, body: bytes) -> Any:
    """Yield the events of an answer, which come one to a line."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    try:
        writer.write(head.encode() + body)
        async for line in reader:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
    finally:
        writer.close()


async def ask(port: int, work: Work, leave_after: int | None, tally: Tally) -> None:
    """Ask once, compare the answer, and note the times. leave_after: events behind which the client goes away."""
    before, text, tokens, last = time.perf_counter(), "", None, None
    async for event in events(port, work.body):
        now = time.perf_counter()
        if event.get("error"):
            break
        if event["choices"]:
            text += event["choices"][0]["text"]
            (tally.between if last else tally.first).append(now - before)
            last = before = now
        else:
            tokens = event["usage"]["completion_tokens"]
        if leave_after is not None:
            leave_after -= 1
            if leave_after <= 0:
                tally.left += 1
                tally.different += not work.text.startswith(text)
                return
    if tokens is None:
        tally.failed += 1
        return
    tally.answers += 1
    tally.tokens += tokens
    tally.lost += abs(tokens - work.tokens)
    tally.different += text != work.text


async def soak(port: int, work: Sequence[Work], clients: int, seconds: float, pid: int) -> tuple[Tally, list[int]]:
    """Let clients ask for some time; return what they saw, and the bytes that the server had resident meanwhile."""
    tally, memory, ending = Tally(), list[int](), time.monotonic() + seconds

    async def client(number: int) -> None:
        dice = random.Random(number)
        while time.monotonic() < ending:
            leave = dice.randint(1, 12) if dice.randrange(LEAVING) == 0 else None
            await ask(port, dice.choice(work), leave, tally)

    async def look() -> None:
        while time.monotonic() < ending:
            memory.append(resident(pid))
            await asyncio.sleep(LOOK)

    await asyncio.gather(look(), *(client(number) for number in range(clients)))
    return tally, memory


def resident(pid: int) -> int:
    """Return the resident set of a process in bytes."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) * 1024


@contextmanager
def serving(package: Path, *options: object) -> Iterator[tuple[int, int, str]]:
    """Run a server; give its port, its process and how its rows decode."""
    line = [sys.executable, "-m", "expe_edge", "serve", package, "--port", 0, "--queue", 1024, *options]
    with subprocess.Popen([str(part) for part in line], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for said in process.stderr:
            found = re.search(r"at http://127\.0\.0\.1:(\d+)/v1; rows decode (.*)", said)
            if found is not None:
                break
        else:
            raise click.ClickException("the server did not start")
        try:
            yield int(found[1]), process.pid, found[2]
        finally:
            process.send_signal(signal.SIGTERM)
            if process.wait(60) != 0:
                raise click.ClickException(f"the server ended with {process.returncode}")


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the 99th percentile of times."""
    found = np.quantile(np.array(seconds), [0.5, 0.99]) * 1000
    return {"p50_ms": round(float(found[0]), 2), "p99_ms": round(float(found[1]), 2)}


def summary(name: str, seconds: float, tally: Tally, memory: Sequence[int]) -> dict[str, Any]:
    """Return the figures of one server."""
    settled = memory[int(min(FILLING, seconds / 4) / LOOK) :]
    counts = {key: value for key, value in asdict(tally).items() if isinstance(value, int)}
    between = milliseconds(tally.between)
    return {
        "server": name,
        "seconds": round(seconds),
        **counts,
        "tokens_per_second": round(tally.tokens / seconds, 1),
        "first": milliseconds(tally.first),
        "between": {**between, "ratio": round(between["p99_ms"] / between["p50_ms"], 2)},
        "memory_mb": {
            "settled": round(settled[0] / 1e6, 1),
            "last": round(settled[-1] / 1e6, 1),
            "most": round(max(settled) / 1e6, 1),
        },
    }


COLUMNS = ("server", "answers", "tokens/s", "first, p50 / p99 ms", "between, p50 / p99 ms", "ratio", "MB")


def row_of(found: dict[str, Any]) -> str:
    """Return a line of a table in Markdown."""
    first, between, memory = found["first"], found["between"], found["memory_mb"]
    cells = [
        *(found["server"], f"{found['answers']:,}", f"{found['tokens_per_second']:,.0f}"),
        f"{first['p50_ms']:.0f} / {first['p99_ms']:.0f}",
        f"{between['p50_ms']:.1f} / {between['p99_ms']:.1f}",
        f"{between['ratio']:.2f}",
        f"{memory['settled']:.0f} → {memory['last']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


@click.command()
@click.argument("package", type=click.Path(path_type=Path), required=False)
@click.option("--clients", default=50, show_default=True)
@click.option("--minutes", default=10.0, show_default=True, help="Of the soak.")
@click.option("--compare", default=1.0, show_default=True, metavar="MINUTES", help="Of each other server; 0 for none.")
@click.option("--requests", default=100, show_default=True, help="Different ones, of which clients choose at random.")
@click.option("--rows", default=16, show_default=True)
@click.option("--threads", type=int, help="Of the server.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures there too.")
def main(
    package: Path | None,
    clients: int,
    minutes: float,
    compare: float,
    requests: int,
    rows: int,
    threads: int | None,
    json_file: Path | None,
) -> None:
    """Print a table of servers, after a line for what was lost or mixed up, which is nothing."""
    package = package or reference_package()
    generator = Generator.load(package)
    generator.prefill_chunk = CHUNK
    work = make_work(generator, requests)
    del generator
    common = ("--context", 1024, *(() if threads is None else ("--threads", threads)))
    ways: dict[str, tuple[tuple[object, ...], float]] = {f"{rows} rows": (("--rows", rows), minutes)}
    if compare:
        ways["one at a time"] = (("--rows", 1), compare)
        ways[f"{rows} rows, one by one"] = (("--rows", rows, "--one-by-one"), compare)
    figures = []
    for name, (options, length) in ways.items():
        with serving(package, *common, *options) as (port, pid, how):
            tally, memory = asyncio.run(soak(port, work, clients, 60 * length, pid))
        figures.append(summary(name, 60 * length, tally, memory) | {"decode": how})
        click.echo(json.dumps(figures[-1]))
    click.echo(f"\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    click.echo("\n".join(map(row_of, figures)))
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if any(found["lost"] or found["different"] or found["failed"] for found in figures):
        raise click.ClickException("tokens were lost or mixed up")


if __name__ == "__main__":
    main()
