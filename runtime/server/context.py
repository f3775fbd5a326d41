"""The outermost ASGI layer: request ids, the access log, and the last word on exceptions."""

from __future__ import annotations

import contextlib
import re
import time
import uuid
from typing import Any

from llmc.runtime.server.errors import error_response
from llmc.runtime.server.logs import log, log_exception
from llmc.runtime.server.metrics import Metrics
from llmc.runtime.server.tracing import Tracing

_CLIENT_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
_MAX_PATH_CHARS = 200


class ContextMiddleware:
    """Gives every request an id of ours. A client's X-Request-Id is echoed if it is harmless, and used for nothing else."""

    def __init__(self, app: Any, metrics: Metrics, *, access_log: bool, tracing: Tracing | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._access_log = access_log
        self._tracing = tracing

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["llmc.request_id"] = uuid.uuid4().hex
        with self._tracing.request(scope) if self._tracing is not None else contextlib.nullcontext():
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        started = time.monotonic()
        request_id = scope["llmc.request_id"]
        shown = _client_id(scope["headers"]) or request_id.encode()
        status = 0
        whole = False  # the answer is out to its end

        async def send_with_id(message: Any) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = scope["llmc.status"] = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", shown)]
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            log_exception("request_failed", error, request=request_id)
            if status == 0:
                await error_response("the server failed on this request; its log has the reason", status=500)(scope, receive, send_with_id)
            elif not whole:
                scope["llmc.abort"]()  # half an answer is out: the client must not take it for a whole one
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.http_requests.labels(route, str(status)).inc()
            if self._access_log and not route.startswith(("/health", "/metrics")):
                log(
                    "request",
                    request=request_id,
                    client_request=shown.decode() if shown != request_id.encode() else None,
                    method=scope["method"][:16],
                    path=scope["path"][:_MAX_PATH_CHARS],
                    status=status,
                    ms=round((time.monotonic() - started) * 1000, 1),
                )


def _client_id(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    for name, value in headers:
        if name == b"x-request-id":
            return value if _CLIENT_ID.fullmatch(value) else None
    return None
