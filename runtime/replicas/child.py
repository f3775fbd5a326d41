"""A replica's process: a server as `llmc serve` runs it, told its settings on stdin; it ends with the process that holds stdin."""

from __future__ import annotations

import os
import signal
import sys
import threading

import msgspec

from llmc.errors import LlmcError
from llmc.runtime.server.main import serve
from llmc.runtime.server.settings import ServerSettings


def end_with_parent() -> None:
    """Kill this process when stdin ends, which it does when whoever started us is gone, however that went."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGKILL)  # the engine process dies with us

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()


def read_settings() -> ServerSettings:
    """The settings: one line of JSON."""
    line = bytearray()
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return msgspec.json.decode(bytes(line), type=ServerSettings)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the front drains and then tells us
    settings = read_settings()
    end_with_parent()
    try:
        return serve(settings)
    except LlmcError as error:
        print(f"llmc: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
