"""`llmc serve --replicas N`: start the replicas, then the front before them; drain on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import uvloop

from llmc.errors import ConfigError
from llmc.runtime.replicas import ray_serve
from llmc.runtime.replicas.front import ReplicaFront
from llmc.runtime.replicas.pool import Backend, Pool
from llmc.runtime.replicas.process import CHILD_COMMAND, ReplicaProcess
from llmc.runtime.server import logs
from llmc.runtime.server.layers import guarded
from llmc.runtime.server.main import bind
from llmc.runtime.server.run import http_server, listening_at, stop_signals
from llmc.runtime.server.settings import ServerSettings

EngineKind = Literal["process", "ray"]
_FRONT_ALONE = ("host", "port", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "allowed_origins")


def serve_replicas(settings: ServerSettings, count: int, engine: EngineKind, *, command: tuple[str, ...] = CHILD_COMMAND) -> int:
    """Run `count` servers of one artifact behind one address until told to stop. Call from the main thread.

    Args:
        settings: as for one server; `engine` without threads or memory of its own is given its share of the machine.
        engine: where replicas run: in processes of this machine, or under Ray Serve.
        command: the program of a replica.

    Returns:
        exit code: 0 after SIGTERM or SIGINT; that of the first replica that could not start.

    Raises:
        ConfigError: a setting that one server alone can have, an address that cannot be bound, or Ray is not installed.
    """
    for name in ("allow_weights", "allow_runtime_lora_updating", "enable_sleep_mode", "trace_startup"):
        if getattr(settings, name):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} acts on one server's engine; leave it out with --replicas, or start one server for each replica")
    if engine == "ray":
        ray_serve.require_ray()
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))  # until the event loop takes the signal over
    entered_at = time.monotonic()
    logs.set_up(settings.log_level)
    listener = bind(settings)
    backends: Sequence[Backend] = ()
    try:
        if engine == "ray":
            backends = ray_serve.start(replica_settings(settings, count), count, command)
        else:
            backends = [ReplicaProcess(replica_settings(settings, count), command) for _ in range(count)]
        return uvloop.run(_run(settings, listener, backends, entered_at))
    finally:
        listener.close()
        if settings.uds is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(settings.uds)
        for backend in backends:
            backend.kill()
        if engine == "ray":
            ray_serve.shut_down()


def replica_settings(settings: ServerSettings, count: int) -> ServerSettings:
    """What each replica is told: no address, and where nothing was asked for an equal share of processors and memory."""
    fields = dict(settings.engine)
    if fields.get("threads") is None:
        fields["threads"] = max(1, len(os.sched_getaffinity(0)) // count)
    if fields.get("num_blocks") is None and fields.get("kv_cache_memory_bytes") is None:
        fields["memory_utilization"] = fields.get("memory_utilization", 0.9) / count
    plain = {f: ServerSettings.__dataclass_fields__[f].default for f in _FRONT_ALONE}
    return replace(settings, engine=fields, **plain)  # type: ignore[arg-type]


async def _run(settings: ServerSettings, listener: object, backends: Sequence[Backend], entered_at: float) -> int:
    pool = Pool(backends)
    front = ReplicaFront(settings, pool)
    # replicas hold no limits on connections and speak no TLS: that is done here
    server = http_server(settings, guarded(front, settings))
    stopping = stop_signals()
    serving = asyncio.create_task(server.serve(sockets=[listener]))  # type: ignore[list-item]
    waits = [asyncio.create_task(event.wait()) for event in (stopping[0], pool.gave_up)]
    background = [asyncio.create_task(pool.watch()), asyncio.create_task(_announce(settings, listener, pool, entered_at))]
    try:
        await asyncio.wait({serving, *waits, background[0]}, return_when=asyncio.FIRST_COMPLETED)
        front.draining = True
        if stopping[0].is_set():
            logs.log("draining", open_requests=pool.num_open, timeout_s=settings.shutdown_timeout_s)
            deadline = time.monotonic() + settings.shutdown_timeout_s
            while pool.num_open and time.monotonic() < deadline and not stopping[1].is_set():
                await asyncio.sleep(0.02)
        for task in background:
            task.cancel()
        # What still runs gets the replicas' own error; they drain no longer than that takes
        await asyncio.gather(*(backend.stop(0.0 if stopping[1].is_set() else 5.0) for backend in backends))
        server.should_exit = True
        await serving
    finally:
        for pending in (*waits, *background):
            pending.cancel()
    if pool.gave_up.is_set():
        logs.log("replica_given_up", exit_code=pool.exit_code)
        return pool.exit_code
    logs.log("stopped")
    return 0


async def _announce(settings: ServerSettings, listener: object, pool: Pool, entered_at: float) -> None:
    """One line when every replica has been ready."""
    where = listening_at(settings, listener)  # type: ignore[arg-type]
    logs.log("listening", url=where, replicas=len(pool.replicas))
    await pool.first_ready.wait()
    total = (time.monotonic() - entered_at) * 1000
    print(f"llmc ready at {where} after {total:.0f} ms ({len(pool.replicas)} replicas)", flush=True)
    logs.log("ready", url=where, total_ms=round(total, 1), replicas=len(pool.replicas))
