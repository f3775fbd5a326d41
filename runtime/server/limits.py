"""Limits before any handler runs: body size and time (ASGI), header size and time, connections (protocol)."""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from llmc.runtime.server.errors import error_object, error_response

_MAX_HEADER_BYTES = 64 * 1024
_JSON_TYPES = (b"application/json", b"")


class BodyMiddleware:
    """ASGI: takes the whole body in, within a size and a time, before the application sees the request.

    Ahead of it nothing is parsed; behind it, `receive` gives the body once and then only the disconnect.
    """

    def __init__(self, app: Any, *, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        stated = headers.get(b"content-length", b"0")
        if stated.isdigit() and int(stated[:20]) > self._max_bytes:
            await self._refuse(scope, receive, send, *self._too_large())
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._read(receive)
        except TimeoutError:
            await self._refuse(scope, receive, send, f"the body did not arrive within {self._timeout_s:g} s", 408, "body_timeout")
            return
        if body is None:
            return  # the client left while sending
        if len(body) > self._max_bytes:
            await self._refuse(scope, receive, send, *self._too_large())
            return
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if body and kind not in _JSON_TYPES:
            # Also what keeps a web page from sending requests here without asking first (CORS).
            await self._refuse(scope, receive, send, "the body must be application/json", 415, "unsupported_media_type", close=False)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Any) -> bytes | None:
        """The body, cut soon after the limit; None when the client went away."""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_bytes or not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> tuple[str, int, str]:
        return f"the body is larger than {self._max_bytes} bytes", 413, "body_too_large"

    async def _refuse(self, scope: Any, receive: Any, send: Any, message: str, status: int, code: str, *, close: bool = True) -> None:
        """Answer; `close`: and hang up, for what is left of the body is not wanted."""
        headers = {"Connection": "close"} if close else {}
        await error_response(message, status=status, code=code, headers=headers)(scope, receive, send)


def _replay(body: bytes, receive: Any) -> Any:
    """A receive() that gives the body once and then passes on what the connection says."""
    given = False

    async def replay() -> dict[str, Any]:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message

    return replay


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with what it lacks: a clock on headers, a bound on them, and a bound on connections.

    It also tells every running request of a connection that the connection is gone; uvicorn tells only the last one, so
    that a pipelined request would let the one before it run on for nobody.
    """

    header_timeout_s = 10.0
    max_connections = 1 << 20

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._in_headers = True  # or between two requests
        self._body_came = False  # with the data that was read last
        self._bytes_beside_body = 0  # read since a part of the body came: trailers, or marks of chunks
        self._upgrading = False
        self._started: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._hang_up(503, "too many connections are open; try again later", "too_many_connections")
            return
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        for cycle in [self._started, *(cycle for cycle, _ in self.pipeline)]:
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_headers:
            self._start_header_timer()
            self._header_bytes += len(data)
        self._unset_keepalive_if_required()
        self._body_came = False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._parse_without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("")
            return
        self._bytes_beside_body = 0 if self._in_headers or self._body_came else self._bytes_beside_body + len(data)
        if self._bytes_beside_body > _MAX_HEADER_BYTES:
            self.transport.abort()
        if self._in_headers and self._header_bytes > _MAX_HEADER_BYTES and not self.transport.is_closing():
            self._hang_up(431, f"the request line and headers are larger than {_MAX_HEADER_BYTES} bytes", "headers_too_large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._start_header_timer()  # it may begin in the middle of what has arrived

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:  # trailers come behind a body: nobody asked for one, and none may pass for a header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            self._upgrading = True
            return
        self._in_headers = False
        self._stop_header_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_came = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrading:
            return
        super().on_message_complete()
        self._in_headers, self._header_bytes = True, 0
        if self.cycle.response_complete and not self.transport.is_closing():  # uvicorn's clock on the pause stopped with the body
            self._stop_header_timer()
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and not self._in_headers and not self.transport.is_closing():
            self._start_header_timer()  # answered ahead of its body, as without a key: nobody reads what is left of it

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._started = cycle
        cycle.scope["llmc.abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]
        super()._start_asgi_task(cycle, app)

    def send_400_response(self, msg: str) -> None:
        self._hang_up(400, "this is not a valid HTTP request", "invalid_http")

    def _parse_without_upgrade(self, rest: bytes) -> None:
        """Ignore an offer to upgrade, as HTTP allows. The parser stopped behind the headers and would lose the body.

        Java's client offers h2c with every request, so this is no rare case.
        """
        self._upgrading = False
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/", self.parser.get_http_version().encode(), b"\r\n"]
        for name, value in self.headers:
            if name not in (b"upgrade", b"connection", b"http2-settings"):
                head += [name, b": ", value, b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"".join([*head, b"\r\n"]) + rest)

    def _start_header_timer(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_timeout_s, self._headers_late)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_late(self) -> None:
        self._header_timer = None
        if self._started is not None and not self._started.response_complete:
            self.transport.abort()  # half a pipelined request behind a running one: no answer can be put in between
        elif not self._in_headers:
            self.transport.close()  # it has its answer
        elif not self.transport.is_closing():
            self._hang_up(408, f"the headers did not arrive within {self.header_timeout_s:g} s", "header_timeout")

    def _hang_up(self, status: int, message: str, code: str) -> None:
        """Answer without the application and close."""
        body = orjson.dumps(error_object(message, status=status, code=code))
        head = f"HTTP/1.1 {status} Error\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()


def limited_protocol(*, header_timeout_s: float, max_connections: int) -> type[LimitedProtocol]:
    """A protocol class with these limits; uvicorn makes its instances itself."""
    limits = {"header_timeout_s": header_timeout_s, "max_connections": max_connections}
    return type("ConfiguredProtocol", (LimitedProtocol,), limits)
