"""The ASGI application: paths, bodies, and answers whole or as a stream of events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from expe_edge.package.directory import MODEL_FILE
from expe_edge.runtime import Generator
from expe_edge.serve.answers import Choice, Envelope, Whole, usage
from expe_edge.serve.choices import longest_token, make_choices
from expe_edge.serve.errors import ApiError
from expe_edge.serve.fields import CompletionBody, read_completion
from expe_edge.serve.guard import Guard, json_error
from expe_edge.serve.metrics import Metrics
from expe_edge.serve.scheduler import Scheduler
from expe_edge.serve.settings import ServerSettings
from expe_edge.serve.tickets import Ticket, TicketOffice

#: Seconds in which a body must have come.
BODY_SECONDS = 30.0
#: Threads that read bodies and encode prompts, so that the loop and the scheduler need not.
READERS = 2


class Service:
    """What answers requests with one generator.

    Args:
        together: whether rows that decode run at once, as of `Batch`.
        created: when the package was opened, in seconds since 1970.
    """

    def __init__(self, generator: Generator, settings: ServerSettings, *, together: bool, created: int) -> None:
        self.generator, self.settings, self.together, self.created = generator, settings, together, created
        self.model = settings.model_name or generator.session.package.path.resolve().name
        self.fingerprint = f"expe_{generator.session.package.manifest.files[MODEL_FILE][:16]}"
        self.longest = longest_token(generator)
        self.metrics = Metrics()
        self.readers = ThreadPoolExecutor(READERS, thread_name_prefix="expe-edge reader")
        self.office: TicketOffice
        self.scheduler: Scheduler

    @asynccontextmanager
    async def running(self, _: Starlette) -> AsyncIterator[None]:
        """Run the scheduler while the application lives."""
        self.office = TicketOffice()
        self.scheduler = Scheduler(
            self.generator, self.settings, self.metrics, self.office.deliver, together=self.together
        )
        self.office.scheduler = self.scheduler
        self.scheduler.start()
        try:
            yield
        finally:
            self.scheduler.stop()
            self.readers.shutdown(cancel_futures=True)

    def drain(self) -> None:
        """Take no more requests, end those that wait, and those that run when their grace is over."""
        ended = ApiError(503, "the server is shutting down", code="shutting_down")
        self.office.fail(self.scheduler.drain(), ended)
        self.office.loop.call_later(self.settings.grace, lambda: self.office.fail(list(self.office.tickets), ended))

    # What is asked

    async def health(self, _: Request) -> Response:
        """Whether the server takes requests."""
        if self.scheduler.draining or not self.scheduler.thread.is_alive():
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return JSONResponse({"status": "ok"})

    async def page_of_metrics(self, _: Request) -> Response:
        """Metrics in Prometheus' text format."""
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, _: Request) -> Response:
        """All models, which is one."""
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def one_model(self, request: Request) -> Response:
        """That model."""
        self._require_model(request.path_params["model"])
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        return {
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "expe-edge",
            "max_model_len": self.settings.context,
        }

    def _require_model(self, name: str | None) -> None:
        if name not in (None, self.model):
            raise ApiError(
                404, f"no model {name[:100]!r}; there is {self.model!r}", param="model", code="model_not_found"
            )

    async def chat(self, _: Request) -> Response:
        """Nothing: the models have no chat template."""
        raise ApiError(
            400,
            f"{self.model!r} is a base model without a chat template; use /v1/completions, and write the turns "
            "into the prompt",
            code="no_chat_template",
        )

    async def completions(self, request: Request) -> Response:
        """What follows prompts."""
        data = await self._body(request)
        loop = asyncio.get_running_loop()
        body, choices = await loop.run_in_executor(self.readers, self._read, data)
        ticket = self.office.open([choice.row for choice in choices], self.settings.timeout)
        if body.stream:
            return EventStream(ticket, self._events(ticket, body, choices))
        with ticket:
            watch = asyncio.create_task(_tell_when_gone(request, ticket))
            try:
                return JSONResponse(await self._whole(ticket, body, choices))
            finally:
                watch.cancel()

    def _read(self, data: bytes) -> tuple[CompletionBody, list[Choice]]:
        body = read_completion(data)
        self._require_model(body.model)
        return body, make_choices(self.generator, body, self.settings, self.longest)

    async def _body(self, request: Request) -> bytes:
        """Return the body of a request.

        Raises:
            ApiError: one that is not JSON by its header, that is too long, or that does not come.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" or "content-encoding" in request.headers:
            raise ApiError(415, "the body must be plain JSON: Content-Type: application/json", code="invalid_type")
        try:
            return await asyncio.wait_for(_read_up_to(request, self.settings.body_bytes), BODY_SECONDS)
        except asyncio.TimeoutError as error:
            raise ApiError(408, f"the body did not come within {BODY_SECONDS:g} seconds", code="timeout") from error

    # What is answered

    async def _whole(self, ticket: Ticket, body: CompletionBody, choices: list[Choice]) -> dict[str, Any]:
        by_row = {choice.row: (choice, Whole()) for choice in choices}
        async for gain in ticket.gains():
            choice, whole = by_row[gain.row]
            part = choice.part(gain)
            if part is not None:
                whole.add(part)
        envelope = Envelope(self.model, self.fingerprint)
        return envelope.of([whole.choice() for _, whole in by_row.values()], usage=usage(ticket.rows, body))

    async def _events(self, ticket: Ticket, body: CompletionBody, choices: list[Choice]) -> AsyncIterator[bytes]:
        envelope, by_row = Envelope(self.model, self.fingerprint), {choice.row: choice for choice in choices}
        more: dict[str, Any] = {"usage": None} if body.include_usage else {}
        try:
            async for gain in ticket.gains():
                part = by_row[gain.row].part(gain)
                if part is not None:
                    yield _event(envelope.of([part], **more))
            if body.include_usage:
                yield _event(envelope.of([], usage=usage(ticket.rows, body)))
        except ApiError as error:
            yield _event(error.body)
        yield b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Events of a ticket, which is closed whether they end or the client goes."""

    media_type = "text/event-stream"

    def __init__(self, ticket: Ticket, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.ticket = ticket

    async def __call__(self, *arguments: Any) -> None:
        """Send them."""
        with self.ticket:
            await super().__call__(*arguments)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


async def _tell_when_gone(request: Request, ticket: Ticket) -> None:
    """Fail a ticket when its client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    ticket.fail(ApiError(499, "the client has closed the connection", code="client_gone"))


async def _read_up_to(request: Request, most: int) -> bytes:
    """Return a body of `most` bytes at most."""
    refusal = ApiError(413, f"the body is longer than {most} bytes", code="body_too_long")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > most:
        raise refusal
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
            if len(data) > most:
                raise refusal
    except ClientDisconnect as error:
        raise ApiError(499, "the client has closed the connection", code="client_gone") from error
    return bytes(data)


def _answer_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return json_error(error)


def _answer_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = json_error(
        ApiError(error.status_code, error.detail, code="not_found" if error.status_code == 404 else None)
    )
    answer.headers.update(error.headers or {})
    return answer


def _answer_fault(_: Request, __: Exception) -> Response:
    return json_error(ApiError(500, "an internal fault; the server's log has more", code="internal_error"))


def make_app(service: Service) -> Starlette:
    """Return the application that a service answers in."""
    routes: dict[str, tuple[str, Callable[[Request], Any]]] = {
        "/health": ("GET", service.health),
        "/metrics": ("GET", service.page_of_metrics),
        "/v1/models": ("GET", service.models),
        "/v1/models/{model:path}": ("GET", service.one_model),
        "/v1/completions": ("POST", service.completions),
        "/v1/chat/completions": ("POST", service.chat),
    }
    middleware = [Middleware(Guard, settings=service.settings, metrics=service.metrics, paths=frozenset(routes))]
    if service.settings.cors_origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=service.settings.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
        middleware.insert(0, cors)
    return Starlette(
        routes=[Route(path, answer, methods=[method]) for path, (method, answer) in routes.items()],
        middleware=middleware,
        lifespan=service.running,
        exception_handlers={ApiError: _answer_api_error, HTTPException: _answer_http_error, Exception: _answer_fault},
    )
