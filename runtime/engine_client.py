"""The front's end of the engine: submit, stream, abort; notice its death, restart it, and end every request once.

Everything here runs on the front's event loop. One engine process lives at a time, each with its own socket, so no
message of an earlier one can reach a later one.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import threading
import time
from asyncio import FIRST_COMPLETED
from collections import deque
from collections.abc import Callable
from enum import Enum

import msgspec
import zmq
import zmq.asyncio

from llmc.errors import InternalError, RequestRejected
from llmc.runtime.engine_process import QUEUE_MESSAGES
from llmc.runtime.engine_spawn import EngineHandle
from llmc.runtime.messages import (
    AbortRequest,
    AdapterChange,
    EngineEvent,
    EngineFailed,
    EngineReady,
    EngineStats,
    FinishReason,
    GenerateRequest,
    Shutdown,
    TokenEvent,
)
from llmc.runtime.request_stream import RequestStream

_RESTART_BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0)  # then the server ends
_STABLE_AFTER_S = 60.0  # an engine that lived this long starts the count of restarts anew
_STOP_TIMEOUT_S = 5.0
_DIED = "the engine stopped while working on this request and is being restarted; send the request again"


class EngineState(Enum):
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    SLEEPING = "sleeping"  # by order: no engine, no memory, until it is woken
    DRAINING = "draining"
    FAILED = "failed"


class EngineClient:
    """Owns the engine process of a server."""

    def __init__(self, launch: Callable[[], EngineHandle], *, max_waiting: int, hang_s: float, log: Callable[..., None]) -> None:
        """
        Args:
            launch: starts a fresh engine process, for restarts.
            max_waiting: sequences that may be open beside the `max_num_seqs` the engine runs; more are refused with 429.
            hang_s: an engine with open requests and no progress for this long is killed and restarted.
            log: called as log(event, **fields) for what an operator should know.
        """
        self._launch = launch
        self._max_waiting = max_waiting
        self._hang_s = hang_s
        self._log = log
        self._open: dict[str, RequestStream] = {}
        self._context = zmq.asyncio.Context(io_threads=1)
        self._socket: zmq.asyncio.Socket | None = None
        self._handle: EngineHandle | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._unsent: deque[AbortRequest] = deque()
        self._decoder = msgspec.msgpack.Decoder(list[EngineEvent])
        self._ready_at = 0.0
        self.state = EngineState.LOADING
        self.ready: EngineReady | None = None
        self.stats: EngineStats | None = None
        self.num_restarts = 0
        self.failure: tuple[str, int] | None = None  # message and exit code, when the engine is given up
        self._wake = asyncio.Event()
        self._asleep = asyncio.Event()
        self._waking: asyncio.Future[None] | None = None  # of who waits for the engine to come back
        self.first_ready = asyncio.Event()
        self.gave_up = asyncio.Event()

    def start(self, handle: EngineHandle) -> None:
        """Take over a started process and keep one running from now on."""
        self._supervisor = asyncio.get_running_loop().create_task(self._supervise(handle))
        self._supervisor.add_done_callback(self._unsupervised)

    @property
    def num_open(self) -> int:
        """Sequences accepted and not ended."""
        return len(self._open)

    @property
    def pid(self) -> int | None:
        return self._handle.process.pid if self._handle is not None else None

    def is_ready(self, stall_s: float) -> bool:
        """Whether a request sent now would be worked on: the engine made progress, or answered idle, within `stall_s`."""
        if self.state is not EngineState.READY:
            return False
        progress = self.stats.time if self.stats is not None else self._ready_at
        return time.monotonic() - max(progress, self._ready_at) < stall_s

    def submit(self, requests: list[GenerateRequest]) -> RequestStream:
        """Send the sequences of one client request to the engine, all or none.

        Raises:
            RequestRejected: 503 while there is no engine, 429 when the queue is full.
        """
        self._check_admission(len(requests))
        stream = RequestStream([r.request_id for r in requests], self._cut_slow_reader)
        for position, request in enumerate(requests):
            if not self._send(request):
                for sent in requests[:position]:
                    self.abort(sent.request_id)
                raise RequestRejected("the engine does not take messages now; try again later", status=503, code="engine_busy")
            self._open[request.request_id] = stream
        return stream

    def abort(self, request_id: str, reason: FinishReason = "abort") -> None:
        """End one sequence: its blocks are free within one step, and no further event of it arrives. Unknown ids: nothing."""
        if self._open.pop(request_id, None) is not None:
            self._unsent.append(AbortRequest(request_id=request_id, reason=reason))
            self._send_aborts()

    def abort_stream(self, stream: RequestStream) -> None:
        """End all sequences of a client request that are still running, and wake its reader."""
        stream.close()
        for request_id in stream.request_ids:
            self.abort(request_id)

    async def change_adapter(self, change: AdapterChange) -> None:
        """Have the engine read or drop a LoRA adapter; returns when it has.

        Raises:
            RequestRejected: it cannot, or there is no engine.
        """
        self.check_state()
        stream = RequestStream([change.request_id], self._cut_slow_reader)
        if not self._send(change):
            raise RequestRejected("the engine does not take messages now; try again later", status=503, code="engine_busy")
        self._open[change.request_id] = stream
        try:
            events = await stream.get()
        finally:
            self._open.pop(change.request_id, None)
        if not events:
            raise RequestRejected("the engine was stopped before it answered; try again later", status=503, code="engine_busy")
        (event,) = events
        if event.error is not None:
            raise RequestRejected(event.error, status=event.error_status, param=event.error_param, code=event.error_code or "bad_adapter")

    def drain(self) -> None:
        """Refuse new requests from now on; running ones go on."""
        if self.state is not EngineState.FAILED:
            self.state = EngineState.DRAINING

    async def sleep(self, timeout_s: float) -> None:
        """End the engine process, which frees its memory; running requests may finish within `timeout_s`, new ones are refused.

        Raises:
            RequestRejected: there is no engine to put to sleep now.
        """
        if self.state is EngineState.SLEEPING:
            await self._fallen_asleep()
            return
        if self.state is not EngineState.READY:
            raise RequestRejected(f"the engine is {self.state.value} and cannot sleep now; try again later", status=503, code="not_ready")
        self.state = EngineState.SLEEPING
        self._asleep.clear()
        deadline = time.monotonic() + timeout_s
        while self._open and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.fail_open("the server was put to sleep before this request was finished; send it again later", 503)
        if self._handle is not None and not self._send(Shutdown()):
            self._handle.process.kill()
        try:
            await asyncio.wait_for(self._fallen_asleep(), _STOP_TIMEOUT_S)
        except TimeoutError:
            if self._handle is not None:
                self._handle.process.kill()
            await self._fallen_asleep()

    async def wake_up(self) -> None:
        """Start an engine again and wait until it is ready. An awake one stays as it is.

        Raises:
            RequestRejected: it did not start, and still sleeps; or it is on its way down or up already.
        """
        if self.state is EngineState.READY:
            return
        if self.state is not EngineState.SLEEPING or not self._asleep.is_set() or self._waking is not None:
            raise RequestRejected(
                f"the engine is {self.state.value} and cannot be woken now; try again later", status=503, code="not_asleep"
            )
        self._waking = asyncio.get_running_loop().create_future()
        self._wake.set()
        await asyncio.shield(self._waking)

    def fail_open(self, message: str, status: int) -> None:
        """End every open sequence with an error its client sees."""
        for request_id in list(self._open):
            self._open.pop(request_id).put(
                TokenEvent(request_id=request_id, token_ids=[], finish_reason="error", error=message, error_status=status)
            )

    async def close(self) -> None:
        """Stop the engine process and wait until it is gone; it is killed if it does not end by itself."""
        self.drain()
        for request_id in list(self._open):
            self.abort(request_id)
        self._wake.set()
        if self._supervisor is not None and not self._supervisor.done():
            handle = self._handle
            if handle is not None and (self.ready is None or not self._send(Shutdown())):
                handle.process.kill()  # still loading: there is nothing to finish
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._supervisor), _STOP_TIMEOUT_S)
            if not self._supervisor.done():
                if handle is not None:
                    handle.process.kill()
                await self._supervisor
        self._context.destroy(linger=0)

    def check_state(self) -> None:
        """Refuse where no request could be worked on.

        Raises:
            RequestRejected: 503 with the reason.
        """
        if self.state is EngineState.SLEEPING:
            raise RequestRejected("the server sleeps; POST /wake_up wakes it", status=503, code="sleeping")
        if self.state is EngineState.DRAINING:
            raise RequestRejected("the server is shutting down and takes no new requests", status=503, code="draining")
        if self.state is not EngineState.READY:
            raise RequestRejected("the model is being loaded; try again later", status=503, code="loading")

    def _check_admission(self, num_new: int) -> None:
        self.check_state()
        most = self._max_waiting + (self.ready.max_num_seqs if self.ready is not None else 0)
        if len(self._open) + num_new > most:
            raise RequestRejected(
                f"the queue is full: {len(self._open)} of {most} sequences are open and this request asks for {num_new}",
                status=429,
                code="queue_full",
            )

    def _send_aborts(self) -> None:
        """Send those that wait. With the engine's queue full they go on waiting, until it has answered something."""
        while self._unsent and self._send(self._unsent[0]):
            self._unsent.popleft()

    def _send(self, message: GenerateRequest | AbortRequest | AdapterChange | Shutdown) -> bool:
        """Queue a message without waiting; False when there is no engine or its queue is full."""
        if self._socket is None:
            return False
        future = asyncio.ensure_future(self._socket.send(self._encoder.encode(message), flags=zmq.NOBLOCK))
        return not (future.done() and future.exception() is not None)  # without waiting it is done at once, either way

    def _cut_slow_reader(self, stream: RequestStream) -> None:
        self._log("slow_reader_cut", request=stream.request_ids[0])
        self.abort_stream(stream)
        if stream.on_cut is not None:
            stream.on_cut()

    async def _supervise(self, handle: EngineHandle) -> None:
        """Run engines one after another until told to stop or until restarting stops making sense."""
        restarts = 0
        while True:
            started_at = time.monotonic()
            message, code = await self._run_one(handle)
            if self.state is EngineState.DRAINING:
                self.fail_open(_DIED, 500)
                return
            if self.state is EngineState.SLEEPING or self._waking is not None:
                woken = await self._sleep_until_woken(message)
                if woken is None:
                    return
                handle, restarts = woken, 0
                continue
            self._log("engine_ended", exit_code=code, message=message, open_requests=len(self._open))
            self.fail_open(_DIED, 500)
            if time.monotonic() - started_at > _STABLE_AFTER_S:
                restarts = 0
            # An artifact or setting that is refused at the first start will be refused again.
            if not self.first_ready.is_set() or restarts >= len(_RESTART_BACKOFF_S):
                self.state, self.failure = EngineState.FAILED, (message, code)
                self.gave_up.set()
                return
            self.state, self.ready, self.stats = EngineState.RESTARTING, None, None
            await asyncio.sleep(_RESTART_BACKOFF_S[restarts])
            if self.state is EngineState.DRAINING:
                return
            restarts += 1
            self.num_restarts += 1
            try:
                handle = self._launch()
            except OSError as error:
                self.state, self.failure = EngineState.FAILED, (f"the engine process could not be started: {error.strerror}", 70)
                self.gave_up.set()
                return

    async def _sleep_until_woken(self, message: str) -> EngineHandle | None:
        """Wait for `wake_up` and start an engine; None: the server ends. `message`: why an engine that was being woken ended."""
        self.fail_open(_DIED, 500)  # it ended before they had finished
        while True:
            self.ready = self.stats = None
            if self.state is not EngineState.DRAINING:
                self.state = EngineState.SLEEPING
            if self._waking is not None:
                self._woken(RequestRejected(f"the engine did not start: {message}", status=500, code="wake_failed"))
            self._asleep.set()
            await self._wake.wait()
            self._wake.clear()
            if self.state is EngineState.DRAINING:
                return None
            self._asleep.clear()
            self.state = EngineState.LOADING
            try:
                return self._launch()
            except OSError as error:
                message = f"no process could be started ({error.strerror})"

    async def _fallen_asleep(self) -> None:
        """Wait until there is no engine any more.

        Raises:
            RequestRejected: because the server ends.
        """
        await self._asleep.wait()
        if self.state is EngineState.DRAINING:
            self.check_state()

    def _unsupervised(self, supervisor: asyncio.Task[None]) -> None:
        """No engine will be brought to sleep or back: tell those who wait for that."""
        self._asleep.set()
        self._woken(RequestRejected("the server is shutting down", status=503, code="draining"))
        error = None if supervisor.cancelled() else supervisor.exception()
        if error is not None:  # no descriptor for a socket, say: without a supervisor an engine's end would go unseen
            message = f"the front could not go on with its engine ({type(error).__name__}: {error})"
            self.state, self.failure = EngineState.FAILED, (message, InternalError.exit_code)
            self.fail_open(_DIED, 500)
            self.gave_up.set()

    def _woken(self, problem: RequestRejected | None) -> None:
        """Tell who waits in `wake_up`."""
        waking, self._waking = self._waking, None
        if waking is None or waking.done():
            return
        if problem is None:
            waking.set_result(None)
        else:
            waking.set_exception(problem)

    async def _run_one(self, handle: EngineHandle) -> tuple[str, int]:
        """Serve one engine process until it has ended. Returns its last words and exit code."""
        self._handle = handle
        self._unsent.clear()  # it knows none of the sequences of the one before
        socket = self._context.socket(zmq.PAIR)
        socket.setsockopt(zmq.SNDHWM, QUEUE_MESSAGES)
        socket.setsockopt(zmq.RCVHWM, QUEUE_MESSAGES)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(handle.endpoint)
        self._socket = socket
        last_words: list[str] = []
        receiver = asyncio.get_running_loop().create_task(self._receive(socket, last_words))
        try:
            ended = asyncio.ensure_future(_exit_of(handle.process))
            while not ended.done():
                await asyncio.wait({ended, receiver} if not receiver.done() else {ended}, timeout=1.0, return_when=FIRST_COMPLETED)
                self._kill_if_lost(handle, receiver, last_words)
            code = ended.result()
            # It may have sent its reason just before it ended.
            if not receiver.done():
                await asyncio.wait({receiver}, timeout=0.05)
        finally:
            receiver.cancel()
            self._socket = None
            socket.close()
            handle.remove_directory()
        message = last_words[-1] if last_words else f"the engine process ended with code {code}"
        return message, code

    def _kill_if_lost(self, handle: EngineHandle, receiver: asyncio.Task[None], last_words: list[str]) -> None:
        """Kill an engine that cannot be understood any more, or that hangs in a step: no request waits for ever."""
        if receiver.done() and handle.process.returncode is None:
            last_words.append(f"the engine sent something that is no message: {type(receiver.exception()).__name__}")
            handle.process.kill()
        elif self._open and self.state is EngineState.READY and not self.is_ready(self._hang_s):
            last_words.append(f"the engine made no progress for {self._hang_s:g} s")
            handle.process.kill()

    async def _receive(self, socket: zmq.asyncio.Socket, last_words: list[str]) -> None:
        while True:
            for event in self._decoder.decode(await socket.recv()):
                if isinstance(event, TokenEvent):
                    self._deliver(event)
                elif isinstance(event, EngineStats):
                    self.stats = event
                elif isinstance(event, EngineReady):
                    self._became_ready(event)
                elif isinstance(event, EngineFailed):
                    last_words.append(event.message)
            self._send_aborts()
            # A message that waits is received without a pause: behind an engine that is ahead, readers would have no turn and look slow.
            await asyncio.sleep(0)

    def _deliver(self, event: TokenEvent) -> None:
        stream = self._open.get(event.request_id)
        if stream is None:
            return  # aborted here a moment ago
        if event.finish_reason is not None:
            del self._open[event.request_id]
        stream.put(event)

    def _became_ready(self, event: EngineReady) -> None:
        assert self._handle is not None
        self._handle.remove_directory()  # connected: nobody else can ever connect
        self.ready, self._ready_at = event, time.monotonic()
        if self.state in (EngineState.LOADING, EngineState.RESTARTING):
            self.state = EngineState.READY
        self.first_ready.set()
        self._woken(None)


async def _exit_of(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process without a child watcher, which uvloop and asyncio do differently. Reaps it."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[int] = loop.create_future()

    def tell(code: int) -> None:
        if not done.done():
            done.set_result(code)

    def wait() -> None:
        code = process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
            loop.call_soon_threadsafe(tell, code)

    threading.Thread(target=wait, name="engine-exit", daemon=True).start()
    return await done
