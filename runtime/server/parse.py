"""A request body becomes a request model, or one short rejection."""

from __future__ import annotations

from typing import Any, TypeVar

import orjson
from pydantic import ValidationError

from llmc.errors import RequestRejected
from llmc.runtime.server.errors import MAX_ERRORS, validation_rejection
from llmc.runtime.server.schemas import NOT_BUILT, RESPONSE_FORMATS, RequestModel, is_absent

MAX_DEPTH = 32
MAX_KEYS = 2048  # of one object
_M = TypeVar("_M", bound=RequestModel)


def parse_body(body: bytes, model: type[_M]) -> _M:
    """Read strict JSON of bounded depth and check it against `model`.

    Raises:
        RequestRejected: 400 with at most ten problems, none of which repeats the input.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestRejected(
            f"the body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}", code="invalid_json"
        ) from None
    if not isinstance(value, dict):
        raise RequestRejected("the body must be a JSON object", code="invalid_json")
    # Few brackets and colons: too little to be deep or wide, and a long list of token ids need not be walked.
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH or body.count(b":") > MAX_KEYS:
        check_shape(value)
    return validated(value, model)


def validated(value: dict[str, Any], model: type[_M]) -> _M:
    """Check an object against `model`. Drops its nulls.

    Raises:
        RequestRejected: as `parse_body`.
    """
    _refuse_unknown(value, model)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        raise validation_rejection((_problem(d) for d in details[: MAX_ERRORS + 1]), len(details)) from None


def check_shape(value: Any) -> None:
    """Bound nesting and the size of objects, without recursion."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                if len(item) > MAX_KEYS:
                    raise RequestRejected(f"an object in the body has {len(item)} keys; at most {MAX_KEYS} are accepted")
                inner.extend(v for v in item.values() if isinstance(v, dict | list))
            else:
                inner.extend(v for v in item if isinstance(v, dict | list))
        if not inner:
            return
        level = inner
    raise RequestRejected(f"the body is nested deeper than {MAX_DEPTH} levels", code="invalid_json")


def _refuse_unknown(value: dict[str, Any], model: type[RequestModel]) -> None:
    """Refuse fields the model has not got, and drop nulls and what else means "as if absent"."""
    unknown = []
    for name in list(value):
        if name in model.model_fields:
            if value[name] is None:
                del value[name]
        elif name in NOT_BUILT and is_absent(name, value[name]):
            del value[name]
        else:
            unknown.append(name)
    if unknown:
        raise validation_rejection(((name, NOT_BUILT.get(name, "is not a field of this request")) for name in unknown), len(unknown))


def _problem(detail: Any) -> tuple[str, str]:
    """(place, what is wrong) of one pydantic error, in words that do not repeat the input."""
    place = [str(part)[:64] for part in detail["loc"] if not str(part).startswith("#")]  # "#...": which arm of a union
    name = place[-1] if place else ""
    kind = detail["type"]
    if kind == "extra_forbidden":
        return ".".join(place), NOT_BUILT.get(name, "is not a field of this request")
    if kind == "literal_error" and name == "type":
        if place[0] == "response_format":
            return ".".join(place), RESPONSE_FORMATS
        if "content" in place:
            return ".".join(place), "only parts of type text are accepted; this server is for text"
        return ".".join(place), "only tools of type function are accepted"
    if kind == "missing":
        return ".".join(place), "is required"
    return ".".join(place), str(detail["msg"])
