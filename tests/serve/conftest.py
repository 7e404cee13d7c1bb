"""Servers that really listen, in a thread of this process, and OpenAI's client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
import pytest

from expe_edge.runtime import Completion, Generator, Sampling
from expe_edge.serve.run import Server, listen, make_server
from expe_edge.serve.settings import ServerSettings
from tests.runtime.conftest import CACHES, generator_of

SETTINGS = ServerSettings(port=0, rows=8, context=256, queue=128, prompt_cache=512, prefill_chunk=16, grace=5)


@dataclass
class Running:
    """A server that answers, and the generator that it answers with."""

    server: Server
    address: str
    generator: Generator
    settings: ServerSettings

    def client(self, **options: Any) -> openai.OpenAI:
        """A client that gives up where the server is late, and asks once."""
        given: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"{self.address}/v1", **given)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=120)

    def expected(self, prompts: Any, **options: Any) -> list[Completion]:
        """What the generator itself answers, with prompts read in the server's chunks, at temperature 1 as OpenAI's."""
        own = Generator(self.generator.session, prefill_chunk=self.settings.prefill_chunk)
        own.end_of_text = self.generator.end_of_text
        sampling = Sampling(**{"temperature": 1.0, **options.pop("sampling", {})})
        return [
            completion
            for index, prompt in enumerate(prompts)
            for completion in own.generate([prompt], sampling=shifted(sampling, index), **options)
        ]


def shifted(sampling: Sampling, index: int) -> Sampling:
    """The settings of a call's row `index`."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + index)


@contextmanager
def running(generator: Generator, settings: ServerSettings) -> Iterator[Running]:
    """Run a server in a thread, and end it."""
    ready, addresses = threading.Event(), list[str]()

    def tell(address: str) -> None:
        addresses.append(address)
        ready.set()

    server, bound = make_server(generator, settings, tell), listen(settings.host, settings.port)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        assert ready.wait(60)
        yield Running(server, addresses[0], generator, settings)
    finally:
        server.should_exit = True
        thread.join(30)
        bound.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def endless_generator(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator:
    """A generator whose texts end where they are told to."""
    return generator_of(checkpoint, tmp_path_factory.mktemp("served"), CACHES["float32"])


@pytest.fixture(scope="session")
def served(endless_generator: Generator) -> Iterator[Running]:
    """A server of the float32 package."""
    with running(endless_generator, SETTINGS) as one:
        yield one


@pytest.fixture
def serving(endless_generator: Generator) -> Iterator[Callable[..., Running]]:
    """Returns a function that starts servers with other settings, which end with the test."""
    with ExitStack() as stack:

        def start(generator: Generator = endless_generator, **changes: Any) -> Running:
            return stack.enter_context(running(generator, replace(SETTINGS, **changes)))

        yield start
