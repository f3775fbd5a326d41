"""One HTTP exchange with a server on a Unix socket of this machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import httptools
import msgspec

_READ_BYTES = 1 << 16
_HOP_BY_HOP = frozenset((b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"upgrade", b"te", b"proxy-connection"))
_NOT_HANDED_ON = _HOP_BY_HOP | {b"expect"}  # the body is here already: a replica's "100 Continue" would be taken for its answer


class ReplicaLost(Exception):
    """The replica ended, or hung up, before its answer was whole."""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A request as a replica is sent it. target: path and query, as they came."""

    method: str
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The head of an answer, without what belongs to the connection alone."""

    status: int
    headers: list[tuple[bytes, bytes]]


class _Answer:
    """What httptools tells while it reads."""

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.parts: list[bytes] = []
        self.headers_complete = self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() not in _HOP_BY_HOP:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.headers_complete = True

    def on_body(self, data: bytes) -> None:
        self.parts.append(data)

    def on_message_complete(self) -> None:
        self.complete = True


async def exchange(socket_path: str, call: Call) -> AsyncGenerator[Head | bytes, None]:
    """The answer's head, then its body as it arrives. Closing the generator hangs up, which ends the request there.

    Raises:
        ReplicaLost: nobody listens, or the connection ended before the answer did.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(socket_path)
    except OSError as error:
        raise ReplicaLost(f"nothing listens on {socket_path}: {error.strerror}") from None
    answer = _Answer()
    parser = httptools.HttpResponseParser(answer)
    told = False
    try:
        writer.write(_encoded(call))
        await writer.drain()
        while not answer.complete:
            data = await reader.read(_READ_BYTES)
            if not data:
                raise ReplicaLost("the connection ended before the answer did")
            parser.feed_data(data)
            if call.method == "HEAD":
                answer.complete = answer.headers_complete  # the length it states is that of a body which does not come
            if answer.headers_complete and not told:
                told = True
                yield Head(status=parser.get_status_code(), headers=answer.headers)
            if answer.parts:
                body = b"".join(answer.parts)
                answer.parts.clear()
                yield body
    except (OSError, httptools.HttpParserError) as error:
        raise ReplicaLost(f"{type(error).__name__} on the connection") from None
    finally:
        writer.close()


def _encoded(call: Call) -> bytes:
    """A request of one connection. The client's own Host stays, and so do the headers that a key or an id comes in."""
    lines = [call.method.encode() + b" " + call.target + b" HTTP/1.1"]
    lines += [name + b": " + value for name, value in call.headers if name not in _NOT_HANDED_ON]
    lines += [b"content-length: " + str(len(call.body)).encode(), b"connection: close", b"", b""]
    return b"\r\n".join(lines) + call.body
