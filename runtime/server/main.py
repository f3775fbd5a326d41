"""`serve`: start the engine, then the HTTP front beside it. Only light imports here: the engine must start first."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from llmc.errors import ConfigError
from llmc.runtime.engine_spawn import EngineHandle, spawn_engine
from llmc.runtime.quick_imports import without_collections
from llmc.runtime.server.settings import ServerSettings

if TYPE_CHECKING:
    from llmc.runtime.server.served_model import ServedModel


def serve(settings: ServerSettings, *, load_model: Callable[[ServerSettings], ServedModel] | None = None) -> int:
    """Run a server until it is told to stop. Call from the main thread.

    Args:
        settings: resolved settings.
        load_model: makes the front's view of the model; None: from the artifact.

    Returns:
        exit code: 0 after SIGTERM or SIGINT, else the code of what failed.

    Raises:
        ConfigError: the address cannot be bound.
        ArtifactError: the front cannot use the artifact.
    """
    entered_at = time.monotonic()
    # Until the event loop takes the signal over: leave through the `finally` below.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    listener = bind(settings)
    handle: EngineHandle | None = None
    try:
        handle = spawn_engine(settings.engine, command=settings.engine_command, stream_interval=settings.stream_interval)
        # Imported after the spawn: 0.3 s of imports run beside the engine's start.
        with without_collections():
            from llmc.runtime.server.run import run

        return run(settings, listener, handle, load_model=load_model, entered_at=entered_at)
    finally:
        listener.close()
        if settings.uds is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(settings.uds)
        if handle is not None:
            _stop(handle)


def bind(settings: ServerSettings) -> socket.socket:
    """A listening socket."""
    try:
        if settings.uds is not None:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            _remove_stale(settings.uds)
            previous = os.umask(0o177)  # this user alone
            try:
                listener.bind(settings.uds)
            finally:
                os.umask(previous)
        else:
            family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((settings.host, settings.port))
        listener.listen(2048)
    except OSError as error:
        where = settings.uds or f"{settings.host}:{settings.port}"
        raise ConfigError(f"cannot listen on {where}: {error.strerror or error}; choose another --host, --port (0: a free one)") from error
    return listener


def _remove_stale(path: str) -> None:
    """Remove the socket of a server that was killed; one that somebody listens on stays, and so does any other file."""
    if not os.path.exists(path) or not stat.S_ISSOCK(os.stat(path).st_mode):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)


def _stop(handle: EngineHandle) -> None:
    """Leave no engine behind, however the front ended."""
    if handle.process.poll() is None:
        handle.process.kill()
    try:
        handle.process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        print(f"the engine process {handle.process.pid} cannot be killed", file=sys.stderr)
    handle.remove_directory()
