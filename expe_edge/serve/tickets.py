"""Between the scheduler's thread and the loop that serves HTTP: whoever waits for rows gets what they gain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress

from expe_edge.runtime.decoding import Row
from expe_edge.serve.errors import ApiError
from expe_edge.serve.scheduler import Gain, Scheduler


class Ticket:
    """What one request waits for: the gains of its rows, up to their ends or its own.

    Used as a context manager, it takes the rows away from the scheduler that have not ended then.
    """

    def __init__(self, office: TicketOffice, rows: Sequence[Row], timeout: float) -> None:
        self.office, self.rows = office, rows
        self.open = set(rows)
        self.events: asyncio.Queue[Gain | ApiError] = asyncio.Queue()
        expired = ApiError(504, f"the request took more than {timeout:g} seconds", code="timeout")
        self.timer = office.loop.call_later(timeout, self.fail, expired)

    def fail(self, error: ApiError) -> None:
        """Let whoever waits get an error next."""
        self.events.put_nowait(error)

    async def gains(self) -> AsyncIterator[Gain]:
        """Yield what rows gain until all have ended.

        Raises:
            ApiError: one has failed, or `fail` was called.
        """
        while self.open:
            event = await self.events.get()
            if isinstance(event, ApiError):
                raise event
            if event.failure is not None:
                raise event.failure
            if event.ended:
                self.open.discard(event.row)
            yield event

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        self.office.close(self)


class TicketOffice:
    """All tickets of a server. Everything but `deliver` is called in the loop's thread."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.tickets: dict[Row, Ticket] = {}
        self.scheduler: Scheduler  # set before the first ticket

    def open(self, rows: Sequence[Row], timeout: float) -> Ticket:
        """Let rows run, and return a ticket for them.

        Raises:
            ApiError: of `Scheduler.submit`.
        """
        ticket = Ticket(self, rows, timeout)
        self.tickets |= dict.fromkeys(rows, ticket)  # before the first gain can come
        try:
            self.scheduler.submit(rows)
        except ApiError:
            ticket.__exit__()
            raise
        return ticket

    def close(self, ticket: Ticket) -> None:
        """Forget a ticket, and let the scheduler forget its rows."""
        for row in ticket.rows:
            self.tickets.pop(row, None)
        self.scheduler.cancel(ticket.open)

    def deliver(self, gains: Sequence[Gain]) -> None:
        """Hand out what a step has brought; called in the scheduler's thread."""
        with suppress(RuntimeError):  # the loop has ended, and nobody waits
            self.loop.call_soon_threadsafe(self._hand_out, gains)

    def _hand_out(self, gains: Sequence[Gain]) -> None:
        for gain in gains:
            ticket = self.tickets.get(gain.row)
            if ticket is not None:
                ticket.events.put_nowait(gain)

    def fail(self, rows: Iterable[Row], error: ApiError) -> None:
        """Let whoever waits for any of `rows` get an error next."""
        for ticket in {self.tickets[row] for row in rows if row in self.tickets}:
            ticket.fail(error)
