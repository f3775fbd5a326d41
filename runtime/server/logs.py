"""Structured logs: one JSON object a line on stderr. Prompts and outputs are never among the fields."""

from __future__ import annotations

import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any

import orjson

_LOGGER = logging.getLogger("llmc.server")
_MAX_FIELD_CHARS = 2000


class _JsonLines(logging.Formatter):
    """JSON escapes line ends and control characters, so that nothing a client sends can forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage()[:_MAX_FIELD_CHARS],
        }
        for name, value in getattr(record, "fields", {}).items():
            line[name] = value[:_MAX_FIELD_CHARS] if isinstance(value, str) else value
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            # The exception's text may quote a prompt; its type and the lines it passed do not.
            line["error"] = type(error).__name__
            line["at"] = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-12:]]
        return orjson.dumps(line, default=str).decode()


def set_up(level: str) -> None:
    """Send our log and uvicorn's to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    logging.raiseExceptions = False  # a full disk behind stderr must not end requests
    for name, least in (("llmc", level), ("uvicorn", "warning"), ("asyncio", "error")):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(max(logging.getLevelName(least.upper()), logging.getLevelName(level.upper())))


def log(event: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Write one line."""
    _LOGGER.log(level, event, extra={"fields": fields})


def log_exception(event: str, error: BaseException, **fields: Any) -> None:
    """Write one line with the exception's type and where it came from, without its text."""
    _LOGGER.error(event, exc_info=(type(error), error, error.__traceback__), extra={"fields": fields})
