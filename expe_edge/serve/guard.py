"""Who may ask: keys, names of the host, and the count of what was answered."""

from __future__ import annotations

import hmac
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expe_edge.serve.errors import ApiError
from expe_edge.serve.metrics import Metrics
from expe_edge.serve.settings import ServerSettings

#: Names by which a machine knows itself.
OWN_NAMES = ("localhost", "127.0.0.1", "[::1]")
#: What answers without a key, so that whoever watches needs none.
OPEN_PATHS = ("/health",)


def json_error(error: ApiError) -> JSONResponse:
    """Return the answer that an error is."""
    return JSONResponse(error.body, error.status, error.headers)


class Guard:
    """Refuses requests without a key, and, at a loopback address, those that are for another host.

    A page of the web can have its own name resolved to this machine and so ask as if it were the server's own; the name
    that it asks for gives it away.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics, paths: frozenset[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths
        self.keys = [key.encode() for key in settings.api_keys]
        names = (*OWN_NAMES, settings.host, *settings.host_names)
        self.names = {name.lower() for name in names} if settings.is_local else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it, and count the answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.metrics.answered(path, message["status"])
            await send(message)

        refusal = self._refusal(scope)
        answer = self.app if refusal is None else json_error(refusal)
        await answer(scope, receive, counting)

    def _refusal(self, scope: MutableMapping[str, Any]) -> ApiError | None:
        headers = Headers(scope=scope)
        name = _without_port(headers.get("host", "")).lower()
        if self.names is not None and name not in self.names:
            return ApiError(421, f"this server does not answer to the host {name[:100]!r}", code="wrong_host")
        if self.keys and scope["path"] not in OPEN_PATHS:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            given = key.strip().encode("latin-1")  # the bytes that came
            if scheme.lower() != "bearer" or not any(hmac.compare_digest(given, known) for known in self.keys):
                return ApiError(401, "no API key, or a wrong one: Authorization: Bearer KEY", code="invalid_api_key")
        return None


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host
