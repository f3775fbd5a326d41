"""A replica in a process of its own on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from dataclasses import replace

import msgspec

from llmc.runtime.replicas.upstream import Call, Head, ReplicaLost, exchange
from llmc.runtime.server.logs import log
from llmc.runtime.server.settings import ServerSettings

CHILD_COMMAND = (sys.executable, "-m", "llmc.runtime.replicas.child")
_READY = Call(method="GET", target=b"/health/ready", headers=[(b"host", b"replica")], body=b"")
_CHECK_TIMEOUT_S = 5.0
_RESTART_AFTER_S = (0.1, 0.5, 1.0, 2.0, 5.0)  # the last one from then on


class ReplicaProcess:
    """A server process on a Unix socket in a folder of this user's alone. `check` starts it again when it has ended."""

    def __init__(self, settings: ServerSettings, command: tuple[str, ...] = CHILD_COMMAND) -> None:
        self._folder = tempfile.mkdtemp(prefix="llmc-replica-")  # mode 0700
        self._socket = os.path.join(self._folder, "s")
        self._settings = replace(settings, uds=self._socket)
        self._command = command
        self._starts = 0
        self._start_at = 0.0
        self.was_ready = False
        self.process = self._spawn()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def exit_code(self) -> int | None:
        """Of the process, once it has ended."""
        return self.process.poll()

    async def check(self) -> bool:
        """Whether a request sent now would be worked on. Starts the process again if it ended after having been ready once."""
        if self.process.poll() is not None:
            if self.was_ready and time.monotonic() >= self._start_at:
                try:
                    self.process = self._spawn()
                except OSError as error:  # no memory or no descriptor at this moment, say; `_start_at` is when it is tried again
                    log("replica_not_started", pid=self.process.pid, reason=error.strerror)
            return False
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT_S):
                async for part in exchange(self._socket, _READY):
                    ready = isinstance(part, Head) and part.status == 200
                    self.was_ready = self.was_ready or ready
                    return ready
        except (ReplicaLost, TimeoutError):
            return False
        return False

    def exchange(self, call: Call) -> AsyncGenerator[Head | bytes, None]:
        """See `upstream.exchange`."""
        return exchange(self._socket, call)

    async def stop(self, timeout_s: float) -> None:
        """SIGTERM, and SIGKILL after `timeout_s`."""
        if self.process.poll() is None:
            self.process.terminate()
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.kill()

    def kill(self) -> None:
        """End it at once and leave nothing behind."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _spawn(self) -> subprocess.Popen[bytes]:
        if self._starts:
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it ended before it had read all
                self.process.stdin.close()
        wait_s = _RESTART_AFTER_S[min(self._starts, len(_RESTART_AFTER_S) - 1)]
        self._start_at = time.monotonic() + wait_s
        self._starts += 1
        # What it prints when ready is ours to say
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, close_fds=True)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended at once: the next check finds that
            process.stdin.write(msgspec.json.encode(self._settings) + b"\n")
            process.stdin.flush()
        return process
