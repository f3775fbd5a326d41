"""Rank 0's executor: tells the other ranks each step before it runs its own."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading

from llmc.errors import ArtifactError, DeviceLost
from llmc.runtime.engine_config import EngineConfig
from llmc.runtime.executors.logits import Logits
from llmc.runtime.parallel.group import Group
from llmc.runtime.parallel.messages import AllocateKV, Failed, Message, Ready, receive, send, step_of
from llmc.runtime.step import DeviceBatch, Executor

WORKER_COMMAND = (sys.executable, "-m", "llmc.runtime.parallel.worker")


class RanksExecutor:
    """An `Executor` over rank 0's and processes of this machine, one for each other rank.

    Every rank computes the whole of the logits; those of rank 0 are taken. A rank that ends makes the step fail on all.

    Raises:
        ArtifactError: a rank could not load its part; the message is its own.
    """

    def __init__(self, executor: Executor, group: Group, ranks: int, config: EngineConfig, threads: int) -> None:
        self._executor = executor
        self._group = group
        self._closing = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[socket.socket] = []
        fields = {**dataclasses.asdict(config), "threads": threads}
        try:
            for rank in range(1, ranks):
                self._start(rank, fields)
            for rank, connection in enumerate(self._connections, start=1):
                answer = receive(connection)
                if not isinstance(answer, Ready):
                    why = answer.message if isinstance(answer, Failed) else "its process ended"
                    raise ArtifactError(f"rank {rank} of {ranks} could not be loaded: {why}")
        except BaseException:
            self.close()
            raise
        for process in self._processes:
            threading.Thread(target=self._watch, args=(process,), name="llmc-rank", daemon=True).start()

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate the caches of every rank, each of its own heads."""
        self._tell(AllocateKV(num_blocks=num_blocks))
        self._executor.allocate_kv(num_blocks)

    def run(self, batch: DeviceBatch) -> Logits:
        """One step, on all ranks at once; rank 0's logits.

        Raises:
            DeviceLost: a rank ended, or the program failed: ranks no longer agree on which sum is next, so none runs again.
        """
        self._tell(step_of(batch))
        try:
            return self._executor.run(batch)
        except Exception as error:  # of whatever kind: the others are in the middle of the step, or will be
            self._group.abort()
            raise DeviceLost(f"the ranks of this model no longer run together: {error}") from None

    def close(self) -> None:
        """End the other ranks and free rank 0's program."""
        self._closing = True
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
        self._connections, self._processes = [], []
        self._executor.close()

    def _start(self, rank: int, fields: dict[str, object]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            fds = (theirs.fileno(), self._group.fd)
            process = subprocess.Popen(WORKER_COMMAND, stdin=subprocess.PIPE, stdout=sys.stderr.fileno(), pass_fds=fds)
            self._processes.append(process)
            self._connections.append(ours)
            assert process.stdin is not None
            options = {"rank": rank, "engine": fields, "connection_fd": fds[0], "memory_fd": fds[1]}
            process.stdin.write(json.dumps(options).encode() + b"\n")
            process.stdin.flush()

    def _tell(self, message: Message) -> None:
        for rank, connection in enumerate(self._connections, start=1):
            try:
                send(connection, message)
            except OSError as error:
                raise DeviceLost(f"rank {rank} is gone ({os.strerror(error.errno or 0)}); its own message is in the log") from None

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        if not self._closing:
            self._group.abort()  # rank 0 may be waiting for it inside the program
