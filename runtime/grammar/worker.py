"""The grammar worker: `python -m llmc.runtime.grammar.worker FD`, FD being its end of a socket pair.

Grammars are compiled in a thread of their own, so that the masks of running sequences do not wait for them. The process ends when
its owner's end is closed, whatever it is doing. It prints nothing: what it works on comes from clients.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec

from llmc.runtime.grammar.compiler import Compiler, GrammarError, short_reason
from llmc.runtime.grammar.protocol import (
    LENGTH,
    Compile,
    Compiled,
    Configure,
    Confirm,
    Confirmed,
    Failed,
    Forget,
    FromWorker,
    MaskRow,
    Masks,
    Match,
    MatchRow,
    Ready,
    ToWorker,
    packed,
)
from llmc.runtime.grammar.session import Session
from llmc.runtime.grammar.spec import GrammarSpec

_MAX_MEMORY_BYTES = 4 << 30  # of address space
_COMPILER_NICE = 10
_STACK_BYTES = 64 << 20  # parsers recurse


class Worker:
    """Answers messages until the socket is closed."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._decoder = msgspec.msgpack.Decoder(ToWorker)
        self._sessions: dict[str, Session] = {}
        threading.stack_size(_STACK_BYTES)
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="compile", initializer=_stand_back)

    def run(self) -> None:
        """Serve; returns when the owner is gone."""
        configure = self._receive()
        if not isinstance(configure, Configure):
            return
        try:
            self._compiler = Compiler(configure.tokenizer_json, configure.vocab_size, configure.eos_token_ids)
        except GrammarError as error:
            self._send(Failed(message=str(error)))
            return
        self._send(Ready())
        while (message := self._receive()) is not None:
            if isinstance(message, Compile):
                self._compiling.submit(self._compile, message)
            elif isinstance(message, Match):
                self._send(Masks(step=message.step, rows=[self._row(row) for row in message.rows]))
            elif isinstance(message, Confirm):
                self._send(Confirmed(step=message.step, accepted=[self._confirm(session, token) for session, token in message.rows]))
            elif isinstance(message, Forget):
                for session in message.sessions:
                    self._sessions.pop(session, None)

    def _compile(self, message: Compile) -> None:
        error = None
        try:
            self._compiler.compiled(message.grammar)
        except GrammarError as reason:
            error = str(reason)
        except Exception as fault:
            error = f"the grammar compiler failed with {type(fault).__name__}"
        self._send(Compiled(key=message.grammar.key, error=error))

    def _row(self, row: MatchRow) -> MaskRow:
        try:
            return self._mask(row)
        except GrammarError as error:
            return MaskRow(mask=b"", error=f"the grammar cannot be followed any further: {short_reason(str(error))}")
        except Exception as error:
            return MaskRow(mask=b"", error=f"the grammar's matcher failed with {type(error).__name__}")

    def _mask(self, row: MatchRow) -> MaskRow:
        session = self._sessions.get(row.session)
        if row.grammar is not None:
            session = self._sessions[row.session] = self._begin(row.grammar)
            session.replay(row.token_ids, row.remaining)
        elif session is not None:
            for token in row.token_ids:
                session.consume(token)
        else:
            raise GrammarError("its session is unknown")
        return MaskRow(mask=session.mask(), way_out=session.watch(row.remaining))

    def _begin(self, grammar: GrammarSpec) -> Session:
        """A session at the start of its document. A grammar not kept any more is compiled again, off this thread's small stack."""
        found = self._compiler.kept(grammar) or self._compiling.submit(self._compiler.compiled, grammar).result()
        return Session(found, self._compiler)

    def _confirm(self, name: str, token: int) -> bool:
        session = self._sessions.get(name)
        return session is not None and session.confirm(token)

    def _receive(self) -> ToWorker | None:
        """The next message; None: the owner is gone."""
        head = self._read(LENGTH.size)
        body = self._read(LENGTH.unpack(head)[0]) if head else b""
        return self._decoder.decode(body) if body else None

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._connection.recv(min(size - len(data), 1 << 20))
            if not part:
                return b""
            data += part
        return bytes(data)

    def _send(self, message: FromWorker) -> None:
        with self._sending:
            self._connection.sendall(packed(message))


def _stand_back() -> None:
    """Let this thread have what processor time the model's leave; on Linux each thread has its own nice value."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _COMPILER_NICE)


def main() -> None:
    """Run the worker process."""
    for limit, value in ((resource.RLIMIT_AS, _MAX_MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))
    try:
        Worker(socket.socket(fileno=int(sys.argv[1]))).run()
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the owner went away in the middle of an answer
    os._exit(0)  # a compile that still runs must not keep the process


if __name__ == "__main__":
    main()
