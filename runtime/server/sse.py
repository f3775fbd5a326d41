"""Server-sent events: a streamed answer that stops when the client does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
from starlette.responses import Response

from llmc.errors import RequestRejected
from llmc.runtime.server.errors import client_field, error_object
from llmc.runtime.server.generation import ClientGone
from llmc.runtime.server.logs import log_exception
from llmc.runtime.server.schemas import SamplingFields

DONE = b"data: [DONE]\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def event(data: dict[str, Any]) -> bytes:
    """One event. orjson escapes line ends, so data cannot break out of it."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


def named_event(data: dict[str, Any]) -> bytes:
    """One event that also has its `type` as the event's name, as OpenAI's newer API sends them."""
    return b"event: " + data["type"].encode() + b"\n" + event(data)


def check_options(body: SamplingFields) -> None:
    """Refuse stream options that could not act.

    Raises:
        RequestRejected: naming the field.
    """
    options = body.stream_options
    if options is not None and not body.stream:
        raise RequestRejected("stream_options needs stream to be true", param="stream_options")
    if options is not None and options.continuous_usage_stats and not options.include_usage:
        raise RequestRejected("continuous_usage_stats needs include_usage to be true", param="stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise RequestRejected("prompt_logprobs cannot be streamed; leave stream out", param="prompt_logprobs")


Failure = Callable[[str, int, str | None, str | None], bytes]  # (message, status, param, code) -> the stream's last bytes


def _failure_event(message: str, status: int, param: str | None, code: str | None) -> bytes:
    return event(error_object(message, status=status, param=param, code=code)) + DONE


class EventStream(Response):
    """An answer that sends what `events` yields. An error after the first byte becomes an error event."""

    def __init__(self, first: bytes, events: AsyncIterator[bytes], close: Callable[[], None], failure: Failure) -> None:
        self.status_code = 200
        self.media_type = "text/event-stream"
        self.background = None
        self.init_headers(_HEADERS)  # not Response.__init__: there is no body, hence no content-length
        self._first = first
        self._events = events
        self._close = close
        self._failure = failure

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except ClientGone:
            return
        except RequestRejected as error:
            failure = self._failure(str(error), error.status, client_field(scope, error.param), error.code)
            await send({"type": "http.response.body", "body": failure, "more_body": True})
        except Exception as error:
            log_exception("stream_failed", error, request=scope["llmc.request_id"])
            failure = self._failure("the server failed on this request; its log has the reason", 500, None, None)
            await send({"type": "http.response.body", "body": failure, "more_body": True})
        finally:
            self._close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def start(events: AsyncIterator[bytes], close: Callable[[], None], *, failure: Failure = _failure_event) -> EventStream:
    """Wait for the first event, so that an early error still has its own HTTP status, then answer with the stream.

    `close` ends the generation behind `events`; it is called however the stream ends. `failure` shapes an error that comes later.
    """
    try:
        first = await anext(events)
    except BaseException:
        close()
        raise
    return EventStream(first, events, close, failure)
