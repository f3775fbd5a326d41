"""The engine's process: an engine between two message queues. `python -m llmc.runtime.engine_process`, options on stdin.

Options (one JSON object, see `ProcessOptions`) come by stdin, so nothing of them shows in the process list. Messages are
`runtime.messages`, MessagePack by msgspec, over a zmq PAIR socket the front has bound in a private directory. The loop
takes in what has arrived, makes one step, sends its events as one message, and sleeps when there is nothing to do.
The process ends on `Shutdown`, and the kernel kills it when its parent dies. It never prints what clients sent.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec
import zmq

from llmc.errors import ConfigError, InternalError, LlmcError, RequestRejected
from llmc.runtime.messages import (
    AbortRequest,
    AdapterChange,
    EngineEvent,
    EngineFailed,
    EngineReady,
    EngineRequest,
    EngineStats,
    FinishReason,
    GenerateRequest,
    Shutdown,
    TokenEvent,
    refusal,
)
from llmc.runtime.quick_imports import without_collections
from llmc.runtime.stream_interval import StreamInterval

QUEUE_MESSAGES = 4096  # per direction, before the sender waits
_MAX_MESSAGE_BYTES = 1 << 30
_STATS_INTERVAL_S = 0.1
_HEARTBEAT_S = 1.0  # an idle engine says so this often; readiness hangs on it
_MAX_MESSAGES_PER_STEP = 1024  # so that a flood of requests cannot keep the running ones waiting
_PR_SET_PDEATHSIG = 1


class ProcessOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the front tells its engine process at start."""

    endpoint: str  # ipc:// address the front has bound or is about to bind
    parent_pid: int
    spawned_at: float  # time.monotonic() of the spawn, the same clock in both processes
    engine: dict[str, Any]  # fields of runtime.engine.EngineConfig
    stream_interval: int = 1  # tokens of a sequence per message


class EngineLike(Protocol):
    """What the loop needs of an engine; `runtime.engine.Engine` is one, tests bring one with canned tokens."""

    ready: EngineReady

    def add(self, request: GenerateRequest) -> Any: ...
    def abort(self, request_id: str, reason: FinishReason = ...) -> list[TokenEvent]: ...
    def step(self) -> list[TokenEvent]: ...
    def has_work(self) -> bool: ...
    def stats(self) -> EngineStats: ...
    def change_adapter(self, change: AdapterChange) -> None: ...
    def close(self) -> None: ...


class _ParentGone(Exception):
    """The front process died; there is nobody left to serve."""


class _Channel:
    """The engine's end of the socket."""

    def __init__(self, endpoint: str, parent_pid: int) -> None:
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE_MESSAGES)
        self._socket.setsockopt(zmq.RCVHWM, QUEUE_MESSAGES)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.LINGER, 2000)
        self._socket.connect(endpoint)
        self._parent_pid = parent_pid
        self._decoder = msgspec.msgpack.Decoder(EngineRequest)
        self._encoder = msgspec.msgpack.Encoder()

    def receive(self, wait_s: float) -> list[EngineRequest]:
        """Messages that have arrived; waits up to `wait_s` for the first."""
        if wait_s > 0 and not self._socket.poll(int(wait_s * 1000)):
            self._check_parent()
            return []
        requests: list[EngineRequest] = []
        while len(requests) < _MAX_MESSAGES_PER_STEP:
            try:
                requests.append(self._decoder.decode(self._socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                break
        return requests

    def send(self, events: list[EngineEvent]) -> None:
        """Send events as one message. Waits while the front's queue is full: an event is never dropped."""
        data = self._encoder.encode(events)
        while not self._socket.poll(1000, zmq.POLLOUT):
            self._check_parent()
        self._socket.send(data)

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def _check_parent(self) -> None:
        if os.getppid() != self._parent_pid:
            raise _ParentGone


def main(make_engine: Callable[[dict[str, Any]], EngineLike] | None = None) -> int:
    """Run the engine process.

    Args:
        make_engine: builds the engine from its options; None: `runtime.engine.Engine`.

    Returns:
        exit code: 0 after Shutdown, an LlmcError's own code, 70 for a fault of ours.
    """
    entered_at = time.monotonic()
    faulthandler.enable()  # a crash in compiled code leaves the Python lines that led to it on stderr; no prompt is among them
    options = msgspec.json.decode(sys.stdin.buffer.read(), type=ProcessOptions)
    _die_with_parent(options.parent_pid)
    channel = _Channel(options.endpoint, options.parent_pid)
    try:
        return _serve(channel, options, make_engine or _make_engine, (entered_at - options.spawned_at) * 1000)
    except _ParentGone:
        return 0
    except LlmcError as error:
        channel.send([EngineFailed(message=str(error))])
        return error.exit_code
    except Exception as error:
        _log_fault("engine_failed", error)
        channel.send([EngineFailed(message=f"the engine failed with {type(error).__name__}; the log has the traceback")])
        return InternalError.exit_code
    finally:
        channel.close()


def _serve(channel: _Channel, options: ProcessOptions, make_engine: Callable[[dict[str, Any]], EngineLike], interpreter_ms: float) -> int:
    engine = make_engine(options.engine)
    try:
        stages = {"interpreter": round(interpreter_ms, 3), **engine.ready.startup_ms}
        channel.send([msgspec.structs.replace(engine.ready, startup_ms=stages)])
        _loop(engine, channel, StreamInterval(options.stream_interval))
    finally:
        engine.close()
    return 0


def _loop(engine: EngineLike, channel: _Channel, interval: StreamInterval) -> None:
    """Step until told to shut down. Any exception but a request's own ends the process, and the front restarts it."""
    sent_stats_at = 0.0
    sent_step = -1
    while True:
        requests = channel.receive(0.0 if engine.has_work() else _HEARTBEAT_S)
        events: list[EngineEvent] = []
        for request in requests:
            if isinstance(request, Shutdown):
                return
            events += _take_in(engine, request)
            if isinstance(request, GenerateRequest):
                interval.begin(request)
        if engine.has_work():
            events += engine.step()
        events = interval.pass_on(events)
        now = time.monotonic()
        stats = engine.stats()
        idle = not engine.has_work()
        due = now - sent_stats_at >= (_STATS_INTERVAL_S if stats.step != sent_step else _HEARTBEAT_S)
        if due or (idle and (events or requests)):
            # An idle engine that got here is answering, which is all the progress there is to make.
            events.append(msgspec.structs.replace(stats, time=now) if idle else stats)
            sent_stats_at, sent_step = now, stats.step
        if events:
            channel.send(events)


def _take_in(engine: EngineLike, request: GenerateRequest | AbortRequest | AdapterChange) -> list[EngineEvent]:
    """Hand one message to the engine. What goes wrong here belongs to this request alone."""
    if isinstance(request, AbortRequest):
        return list(engine.abort(request.request_id, request.reason))
    try:
        if isinstance(request, AdapterChange):
            engine.change_adapter(request)
            return [TokenEvent(request_id=request.request_id, token_ids=[], finish_reason="stop")]
        return list(engine.add(request) or [])
    except ConfigError as error:
        return [refusal(request.request_id, RequestRejected(str(error)))]
    except RequestRejected as error:
        return [refusal(request.request_id, error)]
    except Exception as error:
        _log_fault("request_failed_in_engine", error)
        untold = RequestRejected("the engine could not take this request; the server's log has the reason", status=500)
        return [refusal(request.request_id, untold)]


def _log_fault(event: str, error: Exception) -> None:
    """One JSON line with the exception's type and way. Its text stays out: it may quote a prompt."""
    way = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": "error", "event": event}
    print(json.dumps(line | {"error": type(error).__name__, "at": way}), file=sys.stderr, flush=True)


def _make_engine(options: dict[str, Any]) -> EngineLike:
    # Imported here: the socket is connected first, so that a failing import still reaches the front as a sentence.
    with without_collections():
        from llmc.runtime.engine import Engine
        from llmc.runtime.engine_config import EngineConfig

    return Engine(msgspec.convert(options, EngineConfig))


def _die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the front dies; the front alone decides when to stop it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise InternalError(f"prctl(PR_SET_PDEATHSIG) failed with errno {ctypes.get_errno()}")
    if os.getppid() != parent_pid:  # it died before the line above
        sys.exit(0)
    # Ctrl-C and a service manager signal the whole group; the front drains and then sends Shutdown.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
