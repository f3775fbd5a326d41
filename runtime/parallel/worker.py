"""The process of a rank other than 0: loads its part and runs each step that rank 0 runs. `python -m llmc.runtime.parallel.worker`."""

from __future__ import annotations

import os
import socket
import sys
import threading
from typing import Any

import msgspec

from llmc.errors import LlmcError
from llmc.runtime.engine_config import EngineConfig
from llmc.runtime.parallel.messages import AllocateKV, Failed, Ready, Step, batch_of, receive, send


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is told on stdin, as JSON; stdin stays open as long as rank 0 lives."""

    rank: int
    engine: dict[str, Any]  # fields of EngineConfig
    connection_fd: int
    memory_fd: int


def main() -> int:
    """Run until rank 0 is gone."""
    line = bytearray()
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    options = msgspec.json.decode(bytes(line), type=WorkerOptions)
    threading.Thread(target=_end_with_rank_0, name="end-with-rank-0", daemon=True).start()
    with socket.socket(fileno=options.connection_fd) as connection:
        try:
            _serve(connection, options)
        except LlmcError as error:
            send(connection, Failed(message=str(error)))
            return error.exit_code
    return 0


def _serve(connection: socket.socket, options: WorkerOptions) -> None:
    from llmc.runtime.parallel.load import load_rank  # after the lifeline: loading takes a while

    executor = load_rank(msgspec.convert(options.engine, EngineConfig), options.rank, options.memory_fd)
    send(connection, Ready())
    while (message := receive(connection)) is not None:
        if isinstance(message, AllocateKV):
            executor.allocate_kv(message.num_blocks)
        elif isinstance(message, Step):
            executor.run(batch_of(message))


def _end_with_rank_0() -> None:
    """A rank that waits for a sum of ranks that are gone would wait for ever."""
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
