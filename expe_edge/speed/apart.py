"""An object in a process of its own, so that its memory and its threads are nobody else's."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from expe_edge.errors import GenerationError

Self = TypeVar("Self", bound="Apart")


class Apart:
    """What `make(*arguments)` returns, made and called in a process that ends with this one, or when closed.

    Args:
        make: a class or function at the top of a module; it, what it is given and what methods return is pickled.

    Raises:
        Whatever `make` raises. GenerationError: the process was killed, as where memory ends.
    """

    def __init__(self, make: Callable[..., object], *arguments: object) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, method: str, *arguments: object) -> Any:
        """Return what a method of the object returns, or raise what it raises."""
        with suppress(BrokenPipeError):  # why is said below
            self._connection.send((method, arguments))
        return self._receive()

    def close(self) -> None:
        """End the process, whatever it does just now."""
        self._process.terminate()
        self._process.join()
        self._connection.close()

    def _receive(self) -> Any:
        try:
            fault, value = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join()
            raise GenerationError(
                f"the process that measures ended by itself (exit code {self._process.exitcode}), as one does that the "
                "system kills for its memory; ask for shorter `depths`"
            ) from error
        if fault is not None:
            raise fault
        return value


def _serve(connection: Connection, make: Callable[..., object], arguments: tuple[object, ...]) -> None:
    """Make the object, then answer calls until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks stops asking
    held: object = None
    method: str | None = None
    while True:
        try:
            if method is None:
                held, value = make(*arguments), None
            else:
                value = getattr(held, method)(*arguments)
            connection.send((None, value))
        except Exception as error:  # whatever it is, it is raised where the answer is waited for
            connection.send((error, None))
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
