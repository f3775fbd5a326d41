"""Errors as OpenAI's clients read them, and short: never the input itself, an address or a traceback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import orjson
from starlette.responses import Response

from llmc.errors import RequestRejected

MAX_ERRORS = 10
MAX_MESSAGE_CHARS = 200
MAX_TOTAL_CHARS = 3000  # the answer stays under 4 kB with its frame
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable_error",
}
_NAMES = "llmc.names"  # of fields, in a request's scope
_RETRY_AFTER_S = {429: "1", 503: "2"}


def error_object(message: str, *, status: int, param: str | None = None, code: str | None = None) -> dict[str, dict[str, str | None]]:
    """`{"error": {...}}` with every part bounded."""
    return {
        "error": {
            "message": shorten(message, MAX_TOTAL_CHARS),
            "type": _TYPES.get(status, "server_error"),
            "param": shorten(param, MAX_MESSAGE_CHARS) if param is not None else None,
            "code": shorten(code, MAX_MESSAGE_CHARS) if code is not None else None,
        }
    }


def error_response(
    message: str, *, status: int, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """An error answer; 429 and 503 say when to try again."""
    body = orjson.dumps(error_object(message, status=status, param=param, code=code))
    extra = dict(headers or {})
    if status in _RETRY_AFTER_S:
        extra["Retry-After"] = _RETRY_AFTER_S[status]
    if status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    return Response(body, status_code=status, media_type="application/json", headers=extra)


def rejection_response(error: RequestRejected, scope: Mapping[str, Any]) -> Response:
    """The answer to the request of `scope`."""
    return error_response(str(error), status=error.status, param=client_field(scope, error.param), code=error.code)


def name_fields(scope: MutableMapping[str, Any], **names: str) -> None:
    """Have refusals of a request name the client's own field: where the engine says `prompt`, its `messages` or its `input`.

    Args:
        scope: the request's. Names given before are those of an API around this one, and go on from these.
        names: the client's word for a field, by ours.
    """
    around = scope.get(_NAMES, {})
    scope[_NAMES] = around | {ours: around.get(name, name) for ours, name in names.items()}


def client_field(scope: Mapping[str, Any], param: str | None) -> str | None:
    """What the client calls the field `param`; None: no field is at fault."""
    return None if param is None else scope.get(_NAMES, {}).get(param, param)


def validation_rejection(problems: Iterable[tuple[str, str]], num_problems: int) -> RequestRejected:
    """Join (place, what is wrong) pairs, the first `MAX_ERRORS` of them, into one rejection."""
    lines: list[str] = []
    param: str | None = None
    for place, problem in problems:
        if len(lines) == MAX_ERRORS:
            break
        param = param or place.split(".")[0] or None
        lines.append(shorten(f"{place}: {problem}" if place else problem, MAX_MESSAGE_CHARS))
    if num_problems > len(lines):
        lines.append(f"and {num_problems - len(lines)} more")
    return RequestRejected("; ".join(lines), status=400, param=param, code="invalid_value")


def shorten(text: str, most: int) -> str:
    """At most `most` characters, none of them a control character."""
    clean = "".join(char if char.isprintable() else " " for char in text[: most + 1])
    return clean if len(clean) <= most else clean[: most - 3] + "..."
