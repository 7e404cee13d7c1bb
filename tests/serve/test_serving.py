"""Many at once, some of which go away; limits, time, and a server's end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from expe_edge.errors import ConfigError, GenerationError
from expe_edge.runtime import Batch
from expe_edge.serve.run import listen
from expe_edge.serve.settings import ServerSettings
from tests.command_line import command, refused
from tests.serve.conftest import Running

WORDS = ("the", "a", "tree", "river", "runs", "grows", "under", "over", "old", "bright", "stone", "and", "but")


def prompt_of(index: int) -> str:
    """A prompt of some length; some share their beginnings."""
    shared = " ".join(WORDS[:10]) if index % 3 == 0 else ""
    return f"{shared} {' '.join(WORDS[index % 13 :][: 1 + index % 5])} {index}".strip()


async def ask(client: openai.AsyncOpenAI, index: int) -> str:
    """Ask as client `index` does: every second one for a stream."""
    fields: dict[str, Any] = {"model": "float32", "prompt": prompt_of(index), "max_tokens": 20 + index, "seed": index}
    if index % 2:
        return str((await client.completions.create(**fields)).choices[0].text)
    text = ""
    async for event in await client.completions.create(**fields, stream=True):
        text += event.choices[0].text
    return text


async def ask_and_leave(client: openai.AsyncOpenAI) -> None:
    """Read a little of a long answer, and close the connection."""
    stream = await client.completions.create(model="float32", prompt="the", max_tokens=250, seed=0, stream=True)
    async for _ in stream:
        break
    await stream.close()


def test_fifty_at_once_and_one_that_leaves(served: Running) -> None:
    """None of the others loses a token, or gets another's."""
    expected = [
        served.expected([prompt_of(index)], max_new_tokens=20 + index, sampling={"seed": index})[0].text
        for index in range(50)
    ]

    async def all_at_once() -> list[str]:
        async with served.async_client() as client:
            leaving = [asyncio.create_task(ask_and_leave(client)) for _ in range(2)]
            texts = await asyncio.gather(*(ask(client, index) for index in range(50)))
            await asyncio.gather(*leaving)
            return texts

    assert asyncio.run(all_at_once()) == expected
    until(lambda: metric(served, "expe_edge_running") == 0)
    assert metric(served, 'expe_edge_completions_total{reason="cancelled"}') >= 1


def test_a_soak_of_a_few_seconds(served: Running) -> None:
    """Twenty clients, one request after another, short and long; every answer is compared."""
    expected = {
        index: served.expected([prompt_of(index)], max_new_tokens=20 + index, sampling={"seed": index})[0].text
        for index in range(20)
    }
    ending = time.monotonic() + 4
    counts = [0] * 20

    async def one_client(client: openai.AsyncOpenAI, index: int) -> None:
        while time.monotonic() < ending:
            assert await ask(client, index) == expected[index]
            counts[index] += 1

    async def soak() -> None:
        async with served.async_client() as client:
            await asyncio.gather(*(one_client(client, index) for index in range(20)))

    asyncio.run(soak())
    assert min(counts) >= 1


def metric(served: Running, name: str) -> float:
    """A value of the metrics' page, 0 where there is none yet."""
    page = httpx.get(f"{served.address}/metrics").text
    found = re.search(rf"^{re.escape(name)} (\S+)$", page, flags=re.MULTILINE)
    return float(found[1]) if found else 0.0


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something holds."""
    ending = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ending
        time.sleep(0.01)


def test_metrics(serving: Callable[..., Running]) -> None:
    one = serving()
    one.client().completions.create(model="float32", prompt=3 * ["the tree " * 20], max_tokens=5)

    tokens = len(one.generator.encode("the tree " * 20))
    assert metric(one, 'expe_edge_requests_total{path="/v1/completions",status="200"}') == 1
    assert metric(one, 'expe_edge_completions_total{reason="length"}') == 3
    assert metric(one, "expe_edge_prompt_tokens_total") == 3 * tokens
    assert metric(one, "expe_edge_reused_tokens_total") == 2 * ((tokens - 1) // 16 * 16)
    assert metric(one, "expe_edge_generated_tokens_total") == 15
    assert metric(one, "expe_edge_time_to_first_token_seconds_count") == 3
    assert metric(one, "expe_edge_time_between_tokens_seconds_count") == 12
    assert metric(one, "expe_edge_batch_size_sum") == 12
    assert metric(one, "expe_edge_queue_length") == 0


def test_whoever_leaves_before_an_answer_that_comes_whole(serving: Callable[..., Running]) -> None:
    one = serving()
    with pytest.raises(openai.APITimeoutError):
        one.client(timeout=0.1).completions.create(model="float32", prompt="the", max_tokens=250, n=64)

    until(lambda: metric(one, "expe_edge_running") == metric(one, "expe_edge_queue_length") == 0)
    assert metric(one, 'expe_edge_completions_total{reason="cancelled"}') > 0


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """An event before which no batch makes a step."""
    go, step = threading.Event(), Batch.step

    def waiting(batch: Batch) -> Any:
        go.wait(30)
        return step(batch)

    monkeypatch.setattr(Batch, "step", waiting)
    yield go
    go.set()


def test_a_queue_that_is_full(serving: Callable[..., Running], held: threading.Event) -> None:
    one = serving(rows=2, queue=3)
    answers: list[Any] = []

    def ask_one() -> None:
        answers.append(one.client().completions.create(model="float32", prompt="the", max_tokens=3, seed=0))

    threads = [threading.Thread(target=ask_one) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: len(one.server.service.scheduler.progress) == 2)
    scheduler = one.server.service.scheduler
    until(lambda: len(scheduler.running) >= 1)
    waiting = len(scheduler.queue)
    three = threading.Thread(
        target=lambda: answers.append(
            one.client().completions.create(model="float32", prompt=["the"] * (3 - waiting), max_tokens=3)
        )
    )
    three.start()
    until(lambda: len(scheduler.queue) == 3)

    with pytest.raises(openai.RateLimitError, match="3 completions wait already") as refusal:
        one.client().completions.create(model="float32", prompt="the")
    assert refusal.value.response.headers["retry-after"] == "1"
    held.set()
    for thread in (*threads, three):
        thread.join(30)
    assert len(answers) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(serving: Callable[..., Running], held: threading.Event, stream: bool) -> None:
    one = serving(timeout=0.3)
    with pytest.raises(openai.APIError, match=r"took more than 0\.3 seconds"):
        list(one.client().completions.create(model="float32", prompt="the", stream=stream))
    held.set()
    until(lambda: not one.server.service.scheduler.progress)
    assert one.server.service.office.tickets == {}


def test_a_step_that_fails_loses_its_rows_and_no_others(
    serving: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = serving()
    step = Batch.step

    def failing(_: Batch) -> Any:
        monkeypatch.setattr(Batch, "step", step)
        raise RuntimeError("no memory")

    monkeypatch.setattr(Batch, "step", failing)
    with pytest.raises(openai.InternalServerError, match="an internal fault"):
        one.client().completions.create(model="float32", prompt="the")

    (expected,) = one.expected(["the"], max_new_tokens=9, sampling={"seed": 0})
    answer = one.client().completions.create(model="float32", prompt="the", max_tokens=9, seed=0)
    assert answer.choices[0].text == expected.text


def test_settings_that_are_out_of_range() -> None:
    for name, value in {"rows": 0, "queue": 0, "port": 70000, "grace": -1.0, "api_keys": ("",)}.items():
        with pytest.raises(ConfigError, match=f"`{name}`"):
            ServerSettings(**{name: value})  # type: ignore[arg-type]


def test_an_address_in_use(served: Running) -> None:
    port = int(served.address.rpartition(":")[2])
    with pytest.raises(
        GenerationError, match=rf"^127\.0\.0\.1:{port} cannot be listened at .* change `host` or `port`$"
    ):
        listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["", "a..b", "x" * 64, "\udcff"])
def test_an_address_that_is_none(host: str) -> None:
    with pytest.raises(GenerationError, match=r":0 cannot be listened at \(.+\); change `host` or `port`$"):
        listen(host, 0)


@pytest.mark.usefixtures("elsewhere")
def test_what_the_command_refuses(served: Running, packages: Path) -> None:
    port = served.address.rpartition(":")[2]
    assert "; change --host or --port" in refused("serve", packages / "float32", "--port", port)
    assert refused("serve", packages / "float32", "--rows", "0") == "--rows is 0; from 1 to 1024"
    assert refused("serve", packages / "float32", "--port", "0", "--context", 2**24, "--rows", "1024").endswith(
        "tokens fit: lower --context, --rows or --prompt-cache"
    )


@pytest.mark.usefixtures("elsewhere")
def test_without_its_extra(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "expe_edge.serve.run")
    assert refused("serve", packages / "float32") == "uvicorn is not installed; pip install 'expe-edge[serve]'"


def started(*options: object) -> tuple[subprocess.Popen[str], str]:
    """Start a server in a process of its own; return its address too."""
    process = subprocess.Popen(
        command("serve", *options, "--port", 0),
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    said = process.stderr.readline()
    found = re.search(r"at (http://\S+)/v1", said)
    assert found is not None, said
    return process, found[1]


@pytest.mark.parametrize("grace", [20, 0])
def test_a_process_that_is_told_to_end(packages: Path, grace: int) -> None:
    """Answers under way come whole within the grace, or end with an error that says why; then the process ends."""
    process, address = started(packages / "float32", "--grace", grace, "--rows", 2)
    try:
        body = {"prompt": ["the", "a tree", "over"], "max_tokens": 3000, "stream": True, "logit_bias": {"0": -100}}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        errors = [event["error"] for event in events if "error" in event]
        assert errors[-1]["code"] == "shutting_down"  # the third waited, and is not begun any more
        assert process.wait(30) == 0
    finally:
        process.kill()
        assert process.stderr is not None
        process.stderr.close()
