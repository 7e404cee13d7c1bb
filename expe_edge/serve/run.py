"""Opening a package, listening, and ending well."""

from __future__ import annotations

import math
import signal
import socket
import sys
import time
from collections.abc import Callable

import uvicorn

from expe_edge.errors import GenerationError, reason_of
from expe_edge.runtime import Generator
from expe_edge.runtime.threads import default_threads
from expe_edge.serve.app import Service, make_app
from expe_edge.serve.independence import rows_are_independent
from expe_edge.serve.settings import ServerSettings

#: Connections that the system keeps until they are taken.
BACKLOG = 512
#: Seconds beyond the grace in which the last answers are sent.
LAST_WORDS = 2
#: Seconds after which a thread must let others run: Python's own, 5 ms, are longer than a step.
SWITCH_INTERVAL = 0.0005


class Server(uvicorn.Server):
    """uvicorn's server, which tells the service when it is told to end.

    ready: called with the address once requests are answered.
    """

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self.service, self.ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        if self.started and sockets:
            self.ready(_address(sockets[0]))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let those who run end, within their grace."""
        self.service.drain()
        await super().shutdown(sockets)


def server_threads() -> int:
    """Return how many threads an operator is given where nobody says: a core is left to answer the clients."""
    return max(1, default_threads() - 1)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address.

    Raises:
        GenerationError: no such address, or one in use.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:  # the latter of what no name of a host can be
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise GenerationError(f"{host}:{port} cannot be listened at ({reason}); change `host` or `port`") from error


def _address(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_service(generator: Generator, settings: ServerSettings) -> Service:
    """Return what answers with a generator, once it is certain that there is memory for it.

    Raises:
        GenerationError: memory has no room for the rows, or the encoding has fewer positions than a context.
    """
    session = generator.session
    session.require_within_reach(settings.context)
    kept = -(-settings.prompt_cache // settings.context)
    shortage = session.memory_shortage(settings.context, rows=settings.rows + kept, chunk=settings.prefill_chunk)
    if shortage is not None:
        raise GenerationError(f"{shortage}: lower `context`, `rows` or `prompt_cache`")
    together = settings.together
    if together is None:
        together = rows_are_independent(session, settings.rows)
    return Service(generator, settings, together=together, created=int(time.time()))


def make_server(
    generator: Generator, settings: ServerSettings, ready: Callable[[str], None], *, access_log: bool = False
) -> Server:
    """Return a server whose `run(sockets=[…])` answers until SIGTERM or Ctrl-C, or until `should_exit` is set.

    Requests that run then have their grace to end.

    Args:
        ready: called with the server's address once it answers. access_log: whether to write a line for every answer.

    Raises:
        GenerationError: of `make_service`.
    """
    service = make_service(generator, settings)
    config = uvicorn.Config(
        make_app(service),
        log_level="info" if access_log else "warning",
        access_log=access_log,
        server_header=False,
        lifespan="on",
        limit_concurrency=settings.connections,
        timeout_graceful_shutdown=math.ceil(settings.grace) + LAST_WORDS,
        ws="none",
    )
    return Server(config, service, ready)


def serve_here(server: Server, bound: socket.socket) -> None:
    """Run a server in the main thread. SIGTERM ends it, and the process goes on behind it."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which uvicorn replaces, and raises once more at its end
    server.run(sockets=[bound])
