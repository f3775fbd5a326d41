"""Errors of /v1/messages in the frame Anthropic's clients read, wherever in the server they come from."""

from __future__ import annotations

from typing import Any

import orjson

_PATH = "/v1/messages"
_TYPES = {413: "request_too_large", 500: "api_error", 503: "overloaded_error"}  # other types have the name they have in OpenAI's frame


def framed(error: dict[str, Any], status: int) -> dict[str, Any]:
    """`{"error": {...}}` as Anthropic's API sends it; the error within stays, but for the names of some types."""
    inner = error["error"]
    return {"type": "error", "error": {**inner, "type": _TYPES.get(status, inner["type"])}}


class MessagesFrame:
    """ASGI: gives refusals at /v1/messages and below it their frame: a missing key's, a body's that is too large, a wrong method's.

    Args:
        app: what answers; its errors in OpenAI's frame are put into the other, all else passes as it is.
        root_path: what a proxy may put before the path.
    """

    def __init__(self, app: Any, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not self._is_theirs(scope["path"]):
            await self._app(scope, receive, send)
            return
        held: dict[str, Any] | None = None  # the start of an error's answer: its length is not known yet
        parts: list[bytes] = []

        async def send_framed(message: Any) -> None:
            nonlocal held
            if message["type"] == "http.response.start" and message["status"] >= 400:
                held = message
            elif held is None:
                await send(message)
            else:
                parts.append(message.get("body", b""))
                if not message.get("more_body", False):
                    body = _reframed(b"".join(parts), held["status"])
                    rest = [(name, value) for name, value in held["headers"] if name != b"content-length"]
                    await send({**held, "headers": [*rest, (b"content-length", str(len(body)).encode())]})
                    await send({"type": "http.response.body", "body": body})

        await self._app(scope, receive, send_framed)

    def _is_theirs(self, path: str) -> bool:
        own = path.removeprefix(self._root_path)
        return own == _PATH or own.startswith(_PATH + "/")


def _reframed(body: bytes, status: int) -> bytes:
    """An answer with another's error, such as a replica's, has its frame already; one without a body is for nobody."""
    error = orjson.loads(body) if body else {}
    return orjson.dumps(framed(error, status)) if set(error) == {"error"} else body
