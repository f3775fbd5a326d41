"""JSON answers, by orjson."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.responses import Response


def json_answer(value: Any, status: int = 200) -> Response:
    """An application/json answer."""
    return Response(orjson.dumps(value), status_code=status, media_type="application/json")
