"""A grammar worker with native bugs: words in a grammar make it crash, or hang, where the real one would follow it.

"crash when compiled", "crash when matched", "hang when compiled", "hang when matched".
"""

from __future__ import annotations

import signal
import time

from llmc.runtime.grammar import worker


def _fault(text: str, when: str) -> None:
    if f"crash when {when}" in text:
        signal.raise_signal(signal.SIGSEGV)  # in this thread: one sent to the process may let it answer first
    if f"hang when {when}" in text:
        time.sleep(1000)


class FragileCompiler(worker.Compiler):
    def compiled(self, spec):
        _fault(spec.text, "compiled")
        return super().compiled(spec)


class FragileWorker(worker.Worker):
    def _begin(self, grammar):
        _fault(grammar.text, "matched")
        return super()._begin(grammar)


if __name__ == "__main__":
    worker.Compiler = FragileCompiler
    worker.Worker = FragileWorker
    worker.main()
