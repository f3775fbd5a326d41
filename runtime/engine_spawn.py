"""Start the engine process. Standard library only: `llmc serve` does this before it imports anything else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

DEFAULT_COMMAND = (sys.executable, "-m", "llmc.runtime.engine_process")
_MAX_SOCKET_PATH = 100  # sun_path holds 108 bytes


@dataclass(kw_only=True, slots=True)
class EngineHandle:
    """A started engine process and the private directory its socket lies in."""

    process: subprocess.Popen[bytes]
    directory: str
    endpoint: str  # the front binds it, the engine connects
    spawned_at: float  # time.monotonic()
    spawn_ms: float
    _removed: bool = field(default=False, init=False)

    def remove_directory(self) -> None:
        """Delete the socket's directory; both ends stay connected. May be called again."""
        if not self._removed:
            shutil.rmtree(self.directory, ignore_errors=True)
            self._removed = True


def spawn_engine(engine: dict[str, Any], *, command: tuple[str, ...] = DEFAULT_COMMAND, stream_interval: int = 1) -> EngineHandle:
    """Start the engine process and return at once.

    Args:
        engine: fields of `runtime.engine.EngineConfig`, plain JSON values.
        stream_interval: tokens of a sequence the engine sends together.
        command: the program to run; it reads `engine_process.ProcessOptions` as JSON from stdin.

    Raises:
        OSError: no process or no directory could be made.
    """
    spawned_at = time.monotonic()
    directory = tempfile.mkdtemp(prefix="llmc-", dir=_socket_root())  # mode 0700
    endpoint = f"ipc://{directory}/engine"
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr.fileno(), close_fds=True, env=_environment())
    except OSError:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    assert process.stdin is not None
    options = {
        "endpoint": endpoint,
        "parent_pid": os.getpid(),
        "spawned_at": spawned_at,
        "engine": engine,
        "stream_interval": stream_interval,
    }
    try:
        process.stdin.write(json.dumps(options).encode())
        process.stdin.close()
    except BrokenPipeError:
        process.stdin = None  # it died at once; the client sees that from its exit code
    return EngineHandle(
        process=process,
        directory=directory,
        endpoint=endpoint,
        spawned_at=spawned_at,
        spawn_ms=(time.monotonic() - spawned_at) * 1000,
    )


def _environment() -> dict[str, str]:
    """The engine's: numpy multiplies no matrices there, and its OpenBLAS else starts a thread per core, each of which spins for 40 ms."""
    return {"OPENBLAS_NUM_THREADS": "1", **os.environ}


def _socket_root() -> str:
    """A directory short enough for a socket path: the user's run directory if there is one, else the temporary one."""
    run = os.environ.get("XDG_RUNTIME_DIR")
    if run and os.path.isdir(run) and os.access(run, os.W_OK) and len(run) < _MAX_SOCKET_PATH - 30:
        return run
    temporary = tempfile.gettempdir()
    return temporary if len(temporary) < _MAX_SOCKET_PATH - 30 else "/tmp"
