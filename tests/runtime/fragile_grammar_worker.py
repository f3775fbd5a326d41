"""A grammar worker with native bugs: words in a grammar make it crash, hang, or send nonsense, where the real one would follow it.

"crash when compiled", "crash when matched", "hang when compiled", "hang when matched", "rave when compiled", "rave when matched".
"""

from __future__ import annotations

import signal
import time

from llmc.runtime.grammar import worker

raving: list[str] = []


def _fault(text: str, when: str) -> None:
    if f"crash when {when}" in text:
        signal.raise_signal(signal.SIGSEGV)  # in this thread: one sent to the process may let it answer first
    if f"hang when {when}" in text:
        time.sleep(1000)
    if f"rave when {when}" in text:
        raving.append(text)


class FragileCompiler(worker.Compiler):
    def compiled(self, spec):
        _fault(spec.text, "compiled")
        return super().compiled(spec)


class FragileWorker(worker.Worker):
    def _begin(self, grammar):
        _fault(grammar.text, "matched")
        return super()._begin(grammar)

    def _send(self, message):
        if raving:
            self._connection.sendall(worker.LENGTH.pack(3) + b"\xc1\xc1\xc1")
        super()._send(message)


if __name__ == "__main__":
    worker.Compiler = FragileCompiler
    worker.Worker = FragileWorker
    worker.main()
