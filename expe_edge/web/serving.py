"""A server of a static site for this machine alone, with the headers that let a page have threads."""

from __future__ import annotations

import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from expe_edge.errors import ConfigError

HOST = "127.0.0.1"
#: https://web.dev/articles/coop-coep
ISOLATION = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
#: Files whose names change with their content.
HASHED = ("/assets/", "/ort-")


class SiteHandler(SimpleHTTPRequestHandler):
    """Serves files; nothing is logged.

    isolated: whether the headers are sent that a page needs for threads.
    """

    extensions_map = {  # noqa: RUF012  # as the class it derives from has it
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *arguments: Any, isolated: bool = True, **options: Any) -> None:
        self.isolated = isolated
        super().__init__(*arguments, **options)

    def end_headers(self) -> None:
        """Add isolation, and how long files may be kept without asking."""
        for name, value in ISOLATION.items() if self.isolated else ():
            self.send_header(name, value)
        self.send_header("Cache-Control", "max-age=31536000, immutable" if self.path.startswith(HASHED) else "no-cache")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class SiteServer(ThreadingHTTPServer):
    """Takes it that browsers go away in the middle of a file."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what is not that."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def site_server(directory: Path, port: int, *, isolated: bool = True) -> SiteServer:
    """Return a server of `directory` on this machine's own address; port 0 takes one that is free.

    Raises:
        ConfigError: the port is taken, or out of range.
    """
    try:
        return SiteServer((HOST, port), partial(SiteHandler, directory=str(directory), isolated=isolated))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"`port` {port} cannot be served on ({error}); choose another") from error
