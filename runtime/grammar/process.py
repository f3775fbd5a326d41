"""A grammar worker as its owner sees it. Nothing here waits longer than it is told."""

from __future__ import annotations

import select
import socket
import subprocess
import sys
import time

import msgspec

from llmc.runtime.grammar.protocol import LENGTH, Configure, Failed, FromWorker, Ready, ToWorker, packed

COMMAND = (sys.executable, "-m", "llmc.runtime.grammar.worker")
START_S = 30.0  # reading the tokenizer; more is a fault
_MAX_REPLY_BYTES = 1 << 30


class WorkerDied(Exception):
    """The process ended, or must be ended; the text says why."""


class WorkerProcess:
    """A started worker. Its memory, time and death are its own.

    Args:
        configure: what it works for.
        command: the program; the number of its socket's descriptor is added.

    Raises:
        OSError: no process could be started.
    """

    def __init__(self, configure: Configure, *, command: tuple[str, ...] = COMMAND) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                # Its stderr would show what a native parser says of a client's text.
                self._process = subprocess.Popen(
                    [*command, str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            except OSError:
                ours.close()
                raise
        self._socket = ours
        self._socket.setblocking(False)
        self._decoder = msgspec.msgpack.Decoder(FromWorker)
        self._received = bytearray()
        self._unsent = bytearray(packed(configure))
        self.started_at = time.monotonic()
        self.ready = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToWorker) -> None:
        """Queue a message; what the socket does not take now goes out while receiving."""
        self._unsent += packed(message)
        self._exchange(0.0)

    def receive(self, wait_s: float) -> list[FromWorker]:
        """Messages that have arrived; waits up to `wait_s` for the first. `Ready` is noted, not returned.

        Raises:
            WorkerDied: the process is gone, or says that it cannot work.
        """
        deadline = time.monotonic() + wait_s
        while True:
            messages = self._messages()
            left = deadline - time.monotonic()
            if messages or left <= 0:
                break
            self._exchange(left)
        if not messages:
            self._exchange(0.0)
            messages = self._messages()
        for message in messages:
            if isinstance(message, Failed):
                raise WorkerDied(message.message)
            self.ready = self.ready or isinstance(message, Ready)
        return [message for message in messages if not isinstance(message, Ready)]

    def kill(self) -> None:
        """End it now. May be called again."""
        self._socket.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def _exchange(self, wait_s: float) -> None:
        """Send and receive what can be, waiting up to `wait_s` until something can."""
        poller = select.poll()  # select() knows no descriptor above 1023
        poller.register(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        happened = poller.poll(max(0, int(wait_s * 1000 + 0.999)))
        ready = happened[0][1] if happened else 0
        try:
            if ready & select.POLLOUT:
                del self._unsent[: self._socket.send(self._unsent)]
            if ready & ~select.POLLOUT:
                part = self._socket.recv(1 << 20)
                if not part:
                    raise WorkerDied("the grammar worker ended")
                self._received += part
        except (BrokenPipeError, ConnectionResetError) as error:
            raise WorkerDied("the grammar worker ended") from error

    def _messages(self) -> list[FromWorker]:
        """Whole messages among the bytes received."""
        messages: list[FromWorker] = []
        while len(self._received) >= LENGTH.size:
            size = LENGTH.unpack_from(self._received)[0]
            if size > _MAX_REPLY_BYTES:
                raise WorkerDied("the grammar worker sent what is no message")
            if len(self._received) < LENGTH.size + size:
                break
            body = bytes(self._received[LENGTH.size : LENGTH.size + size])
            del self._received[: LENGTH.size + size]
            try:
                messages.append(self._decoder.decode(body))
            except msgspec.DecodeError as error:  # its memory may be spoilt, if its parsers have a bug
                raise WorkerDied("the grammar worker sent what is no message") from error
        return messages
