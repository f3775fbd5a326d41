"""The one endpoint before the replicas: passes requests on, and answers itself what is asked of all of them.

A request goes to the ready replica with the fewest open ones. If that one is lost before the first byte of its answer was passed on,
or answers 503, the request goes to another one, once: it has no effect but its answer, and a second one of these might lie in the
request. A stream that has begun ends with an error event in the shape of its API.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import prometheus_client
from starlette.responses import Response

from llmc.runtime.replicas.merged_metrics import merged
from llmc.runtime.replicas.pool import Pool, Replica
from llmc.runtime.replicas.upstream import Call, Head, ReplicaLost
from llmc.runtime.server.answers import json_answer
from llmc.runtime.server.errors import error_object, error_response
from llmc.runtime.server.logs import log
from llmc.runtime.server.messages_frame import framed
from llmc.runtime.server.settings import ServerSettings
from llmc.runtime.server.sse import DONE, event, named_event

_ATTEMPTS = 2
_METRICS_TIMEOUT_S = 5.0
_LOST = "the replica that computed this answer was lost; send the request again"


class ReplicaFront:
    """The ASGI application behind keys and limits."""

    def __init__(self, settings: ServerSettings, pool: Pool) -> None:
        self._settings = settings
        self._pool = pool
        self.draining = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"].removeprefix(self._settings.root_path)
        if path in ("/health", "/health/ready"):
            await self._health()(scope, receive, send)
        elif path == "/health/live":
            await json_answer({"status": "live"})(scope, receive, send)
        elif path == "/load":
            await self._load()(scope, receive, send)
        elif path == "/metrics":
            await (await self._metrics())(scope, receive, send)
        elif self.draining:
            await error_response("the server is shutting down", status=503, code="draining")(scope, receive, send)
        else:
            await self._until_gone(scope, receive, send)

    def _health(self) -> Response:
        """Ready while one replica is: a request sent now would be worked on."""
        if self.draining:
            return error_response("the server is shutting down", status=503, code="not_ready_draining")
        if not self._pool.num_ready:
            return error_response("no replica is ready", status=503, code="not_ready_loading")
        return json_answer({"status": "ready", "replicas": len(self._pool.replicas), "replicas_ready": self._pool.num_ready})

    def _load(self) -> Response:
        replicas = [{"replica": r.index, "ready": r.ready, "open_requests": r.num_open} for r in self._pool.replicas]
        return json_answer({"server_load": self._pool.num_open, "replicas": replicas})

    async def _metrics(self) -> Response:
        key = [(b"authorization", b"Bearer " + self._settings.api_keys[0].encode())] if self._settings.api_keys else []
        call = Call(method="GET", target=b"/metrics", headers=[(b"host", b"replica"), *key], body=b"")

        async def page(replica: Replica) -> tuple[int, str] | None:
            with contextlib.suppress(ReplicaLost, TimeoutError):
                async with asyncio.timeout(_METRICS_TIMEOUT_S):
                    head, body = await _whole(replica.backend.exchange(call))
                    return (replica.index, body.decode()) if head.status == 200 else None
            return None

        pages = await asyncio.gather(*(page(replica) for replica in self._pool.replicas if replica.ready))
        text = merged(dict(found for found in pages if found is not None), self._pool)
        return Response(text, headers={"content-type": prometheus_client.CONTENT_TYPE_LATEST})

    async def _until_gone(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on; a client that leaves ends it, here and in the replica."""
        body = (await receive()).get("body", b"")
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        call = Call(method=scope["method"], target=target, headers=list(scope["headers"]), body=body)
        answering = asyncio.create_task(self._answer(call, scope, receive, send))
        leaving = asyncio.create_task(receive())
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            answering.cancel()  # without effect on one that is done
            with contextlib.suppress(asyncio.CancelledError):
                await answering

    async def _answer(self, call: Call, scope: Any, receive: Any, send: Any) -> None:
        tried: set[int] = set()
        refused: tuple[Head, bytes] | None = None
        while len(tried) < _ATTEMPTS and (replica := self._pool.choose(tried)) is not None:
            tried.add(replica.index)
            with replica.counted():
                try:
                    async with contextlib.aclosing(replica.backend.exchange(call)) as parts:
                        head = await _head(parts)
                        if _streams(head):
                            await self._stream(replica, head, parts, scope, send)
                            return
                        body = await _rest(parts)
                except ReplicaLost as error:
                    replica.lose()
                    log("request_lost_by_replica", replica=replica.index, reason=str(error), attempt=len(tried))
                    continue
            if head.status != 503:
                await _send(send, head, body, call)
                return
            refused = head, body  # loading or restarting, say: another one may be ready
        if refused is not None:
            await _send(send, *refused, call)
            return
        message = _LOST if tried else "no replica is ready; try again later"
        await error_response(message, status=503, code="replica_lost" if tried else "no_replica_ready")(scope, receive, send)

    async def _stream(self, replica: Replica, head: Head, parts: AsyncGenerator[Head | bytes, None], scope: Any, send: Any) -> None:
        """Pass a stream on. Until its first byte is here, losing the replica is the caller's to mend.

        Raises:
            ReplicaLost: before anything was sent.
        """
        first = await anext(parts, b"")
        await send({"type": "http.response.start", "status": head.status, "headers": head.headers})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        try:
            async for part in parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except ReplicaLost as error:
            replica.lose()
            log("stream_lost_by_replica", replica=replica.index, reason=str(error))
            await send({"type": "http.response.body", "body": _last_event(scope["path"]), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _streams(head: Head) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in head.headers)


def _last_event(path: str) -> bytes:
    """What ends a stream whose replica was lost; at the start, whatever part of an event went before."""
    error = error_object(_LOST, status=503, code="replica_lost")
    if path.endswith("/v1/messages"):
        return b"\n\n" + named_event(framed(error, 503))
    return b"\n\n" + event(error) + DONE


async def _head(parts: AsyncGenerator[Head | bytes, None]) -> Head:
    head = await anext(parts)
    assert isinstance(head, Head), "an exchange begins with the head"
    return head


async def _rest(parts: AsyncGenerator[Head | bytes, None]) -> bytes:
    return b"".join([part async for part in parts if isinstance(part, bytes)])


async def _whole(parts: AsyncGenerator[Head | bytes, None]) -> tuple[Head, bytes]:
    async with contextlib.aclosing(parts):
        return await _head(parts), await _rest(parts)


async def _send(send: Any, head: Head, body: bytes, call: Call) -> None:
    length = [] if call.method == "HEAD" else [(b"content-length", str(len(body)).encode())]
    headers = [*head.headers, *length]
    await send({"type": "http.response.start", "status": head.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
