"""`--trace-startup FILE`: the stages of both processes' start as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing.

The format is Chrome's Trace Event Format, complete events ("X") in microseconds.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmc.errors import ConfigError


def startup_events(
    front: Mapping[str, float], engine: Mapping[str, float], *, front_pid: int, engine_pid: int, total_ms: float
) -> list[dict[str, Any]]:
    """Trace events of a start.

    Args:
        front: stage -> ms, one after the other from the start of `serve`.
        engine: stage -> ms in the order they ended; "a.b" lies at the begin of "a". The first, the interpreter, begins with the spawn;
            the others are laid back to back up to the moment of readiness, which is how the engine runs them: what lies between is imports.
        total_ms: from the start of `serve` to readiness.
    """
    events: list[dict[str, Any]] = []
    for pid, name in ((front_pid, "front"), (engine_pid, "engine")):
        events.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}})

    def add(pid: int, tid: int, name: str, began_ms: float, ms: float) -> None:
        events.append({"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": round(began_ms * 1000), "dur": round(ms * 1000)})

    at = 0.0
    for name, ms in front.items():
        add(front_pid, 0, name, at, ms)
        at += ms
    whole = [name for name in engine if "." not in name]
    if not whole:
        return events
    spawned = front.get("spawn", 0.0)
    add(engine_pid, 0, whole[0], max(0.0, spawned / 2), engine[whole[0]])
    at = total_ms - sum(engine[name] for name in whole[1:])
    imports = at - spawned / 2 - engine[whole[0]]
    if imports > 0:
        add(engine_pid, 0, "imports", spawned / 2 + engine[whole[0]], imports)
    for name in whole[1:]:
        add(engine_pid, 0, name, at, engine[name])
        rows = itertools.count(1)  # side by side
        for part, ms in engine.items():
            if part.startswith(name + "."):
                add(engine_pid, next(rows), part, at, ms)
        at += engine[name]
    return events


def write_trace(path: str, events: list[dict[str, Any]]) -> None:
    """Write the file whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": events}), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"trace_startup={path}: cannot be written: {error.strerror}") from None
