"""The front's event loop: bring up HTTP and the engine client, announce readiness, drain on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import resource
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
import uvloop

from llmc.errors import ConfigError, InternalError
from llmc.runtime.engine_client import EngineClient
from llmc.runtime.engine_spawn import EngineHandle, spawn_engine
from llmc.runtime.lora import AdapterPath
from llmc.runtime.server import logs
from llmc.runtime.server.adapters import Adapters
from llmc.runtime.server.app import build_app
from llmc.runtime.server.front import Front
from llmc.runtime.server.limits import limited_protocol
from llmc.runtime.server.metrics import Metrics
from llmc.runtime.server.reload import Reload
from llmc.runtime.server.served_model import ServedModel, load_served_model
from llmc.runtime.server.settings import ServerSettings
from llmc.runtime.server.startup_trace import startup_events, write_trace
from llmc.runtime.server.tracing import Tracing

_CLOSE_TIMEOUT_S = 2  # for connections that are answered but not closed by their client
_SHUTTING_DOWN = "the server is shutting down and did not finish this request in time"


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: draining needs the listener open, to answer 503."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(
    settings: ServerSettings,
    listener: socket.socket,
    handle: EngineHandle,
    *,
    load_model: Callable[[ServerSettings], ServedModel] | None,
    entered_at: float,
) -> int:
    """See `main.serve`. `entered_at`: time.monotonic() when serve began, for the start-up figures."""
    logs.set_up(settings.log_level)
    stages = {"spawn": handle.spawn_ms, "imports": _ms_since(entered_at) - handle.spawn_ms}
    started = time.monotonic()
    model = (load_model or load_served_model)(settings)
    stages["tokenizer"] = _ms_since(started)
    model = dataclasses.replace(model, generation_defaults=model.generation_defaults | settings.override_generation_config)
    for adapter in settings.engine.get("lora_modules", ()):
        if adapter["name"] in model.names:
            raise ConfigError(f"--lora-modules names an adapter {adapter['name']!r}, as the model itself is called; take another name")
    return uvloop.run(_run(settings, listener, handle, model, stages, entered_at))


async def _run(
    settings: ServerSettings,
    listener: socket.socket,
    handle: EngineHandle,
    model: ServedModel,
    stages: dict[str, float],
    entered_at: float,
) -> int:
    engine = dict(settings.engine)
    client = EngineClient(
        lambda: spawn_engine(engine, command=settings.engine_command, stream_interval=settings.stream_interval),
        max_waiting=settings.max_queue,
        hang_s=settings.hang_timeout_s,
        log=logs.log,
    )
    tracing = Tracing(settings.otlp_traces_endpoint, model.name) if settings.otlp_traces_endpoint is not None else None
    workers = asyncio.Semaphore(settings.renderer_num_workers)
    front = Front(settings=settings, model=model, client=client, metrics=Metrics(model.name, client), workers=workers)
    front.adapters.update({one["name"]: AdapterPath(**one) for one in engine.get("lora_modules", ())})
    reload = Reload(front, engine) if settings.allow_weights else None
    adapters = Adapters(front, engine) if settings.allow_runtime_lora_updating else None
    server = http_server(settings, build_app(front, tracing, reload, adapters))
    client.start(handle)
    stopping = stop_signals()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    waits = [asyncio.create_task(event.wait()) for event in (stopping[0], client.gave_up)]
    background = [asyncio.create_task(_announce(settings, listener, client, stages, entered_at))]
    if not settings.disable_log_stats:
        background.append(asyncio.create_task(_log_stats(client, settings.stats_interval_s)))
    try:
        await asyncio.wait({serving, *waits}, return_when=asyncio.FIRST_COMPLETED)
        if stopping[0].is_set():
            logs.log("draining", open_sequences=client.num_open, timeout_s=settings.shutdown_timeout_s)
            client.drain()
            await _drained(client, server, settings.shutdown_timeout_s, stopping[1])
        client.fail_open(_SHUTTING_DOWN, 503)
        server.should_exit = True
        await serving
    finally:
        for task in (*waits, *background):
            task.cancel()
        await client.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
    if client.failure is not None:
        message, code = client.failure
        logs.log("engine_given_up", level=logging.ERROR, message=message, exit_code=code)
        return code if code > 0 else InternalError.exit_code
    logs.log("stopped")
    return 0


def http_server(settings: ServerSettings, app: Any) -> _Server:
    """uvicorn over an ASGI application, with our limits and certificates.

    Raises:
        ConfigError: the certificate and key cannot be used.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    protocol = limited_protocol(header_timeout_s=settings.header_timeout_s, max_connections=settings.max_connections or max(16, limit // 4))
    config = uvicorn.Config(
        app,
        http=protocol,
        loop="none",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(settings.keep_alive_timeout_s) or 1,
        timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_certfile=settings.ssl_certfile,
        ssl_ca_certs=settings.ssl_ca_certs,
        ssl_cert_reqs=settings.ssl_cert_reqs,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(file for file in (settings.ssl_certfile, settings.ssl_keyfile, settings.ssl_ca_certs) if file)
        raise ConfigError(f"the certificate and key cannot be used ({error.strerror or error}): {files}") from None
    return _Server(config)


def stop_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events of the first signal (drain) and the second (stop now)."""
    first, second = asyncio.Event(), asyncio.Event()

    def stop() -> None:
        (second if first.is_set() else first).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    return first, second


async def _drained(client: EngineClient, server: _Server, timeout_s: float, hurry: asyncio.Event) -> None:
    """Wait until every request is answered, at most `timeout_s`, or until told to hurry."""
    deadline = time.monotonic() + timeout_s
    while (client.num_open or server.server_state.tasks) and time.monotonic() < deadline and not hurry.is_set():
        await asyncio.sleep(0.02)


async def _announce(
    settings: ServerSettings, listener: socket.socket, client: EngineClient, stages: dict[str, float], entered_at: float
) -> None:
    """Print one line when the first request can be worked on: where, and how long each stage took."""
    where = listening_at(settings, listener)
    logs.log("listening", url=where)
    await client.first_ready.wait()
    assert client.ready is not None
    total = _ms_since(entered_at)
    engine = {f"engine.{stage}": ms for stage, ms in client.ready.startup_ms.items()}
    shown = ", ".join(f"{stage} {ms:.0f}" for stage, ms in (stages | engine).items())
    print(f"llmc ready at {where} after {total:.0f} ms ({shown})", flush=True)
    times: dict[str, Any] = {f"{stage}_ms": round(ms, 1) for stage, ms in (stages | engine).items()}
    logs.log("ready", url=where, total_ms=round(total, 1), **times)
    if settings.trace_startup is not None:
        events = startup_events(stages, client.ready.startup_ms, front_pid=os.getpid(), engine_pid=client.pid or 0, total_ms=total)
        try:
            write_trace(settings.trace_startup, events)
        except ConfigError as error:
            logs.log("trace_not_written", level=logging.ERROR, message=str(error))
    # What lives now lives for ever: later collections need not walk it. Looking for garbage first takes 20 ms, which the first request
    # would wait for, and finds 0.2 MB.
    gc.freeze()


def listening_at(settings: ServerSettings, listener: socket.socket) -> str:
    """Where clients find the server: a URL, or "unix:" and a path."""
    address = settings.uds or listener.getsockname()
    return f"unix:{address}" if isinstance(address, str) else _url(address, secure=settings.ssl_certfile is not None)


def _url(address: tuple[str, int], *, secure: bool) -> str:
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"{'https' if secure else 'http'}://{host}:{address[1]}"


async def _log_stats(client: EngineClient, interval_s: float) -> None:
    """One line of figures per interval in which something happened."""
    last = (0, 0)
    while True:
        await asyncio.sleep(interval_s)
        stats = client.stats
        if stats is None or (stats.prompt_tokens, stats.generation_tokens) == last:
            continue
        logs.log(
            "stats",
            prompt_tokens_per_s=round(max(0, stats.prompt_tokens - last[0]) / interval_s, 1),
            generation_tokens_per_s=round(max(0, stats.generation_tokens - last[1]) / interval_s, 1),
            running=stats.num_running,
            waiting=stats.num_waiting,
            kv_usage=round(stats.kv_blocks_used / max(1, stats.kv_blocks_total), 3),
            prefix_hit_rate=round(stats.prefix_hits_tokens / max(1, stats.prefix_queries_tokens), 3),
            preemptions=stats.num_preemptions,
        )
        last = (stats.prompt_tokens, stats.generation_tokens)


def _ms_since(start: float) -> float:
    return (time.monotonic() - start) * 1000
