"""Events of one client request on their way from the engine's client to its handler."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from llmc.runtime.messages import TokenEvent

_MAX_BUFFERED_EVENTS = 4096  # per client request; a reader this far behind is cut


class RequestStream:
    """Events of one client request, that is of all its sequences, in the order they happened."""

    def __init__(self, request_ids: list[str], on_overflow: Callable[[RequestStream], None]) -> None:
        self.request_ids = request_ids
        self.on_cut: Callable[[], None] | None = None  # set by who writes to the client: close the connection at once
        self._events: list[TokenEvent] = []
        self._waiter: asyncio.Future[None] | None = None
        self._on_overflow = on_overflow
        self.closed = False

    async def get(self) -> list[TokenEvent]:
        """All events waiting, at least one; waits for it. An empty list: the stream was closed."""
        if not self._events and not self.closed:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self._events = self._events, []
        return events

    def put(self, event: TokenEvent) -> None:
        """Add an event. Called by the client alone; a stream nobody reads is cut, once."""
        if self.closed:
            return
        if len(self._events) >= _MAX_BUFFERED_EVENTS:
            self.close()
            self._on_overflow(self)
            return
        self._events.append(event)
        self._wake()

    def close(self) -> None:
        """Nobody wants the events any more: drop them and wake the reader."""
        self.closed = True
        self._events.clear()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
