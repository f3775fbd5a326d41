"""Servers for the tests of this folder: the real front over an engine with the real scheduler, runner and sampler, and canned logits.

`python -m tests.reliability.served '{"settings": ..., "engine": ...}'` is the server process; SIGUSR1 moves its wall clock a day back.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

import httpx

from tests.server.running import ROOT, children

LONG = {"max_tokens": 150, "ignore_eos": True}


class Server:
    """A running server; `close` it, or use it with `with`."""

    def __init__(self, *, step_s: float = 0.002, log: BinaryIO | None = None, **settings: Any) -> None:
        argument = json.dumps({"settings": settings, "engine": {"step_s": step_s, "vocab": 400}})
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._log = tempfile.TemporaryFile() if log is None else None  # noqa: SIM115 - closed by close
        stream = log if log is not None else self._log
        command = [sys.executable, "-m", "tests.reliability.served", argument]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, env=environment, cwd=ROOT)
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        found = re.search(r"llmc ready at (\S+) ", line)
        assert found is not None, (line, self.process.wait(10), self.log())
        self.url = found[1]
        self.port = int(self.url.rsplit(":", 1)[1]) if self.url.startswith("http") else 0
        transport = None if self.port else httpx.HTTPTransport(uds=self.url.removeprefix("unix:"))
        self.http = httpx.Client(base_url=self.url if self.port else "http://x", timeout=20, transport=transport)

    def log(self) -> str:
        if self._log is None:
            return "(elsewhere)"
        self._log.seek(0)
        return self._log.read().decode()

    def complete(self, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 4, **fields})

    def stream(self, **fields: Any) -> socket.socket:
        """A connection on which a streamed answer has begun."""
        body = json.dumps({"prompt": [1, 2, 3], "stream": True, **LONG, **fields}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(head.encode() + body)
        return connection

    def engine_pid(self) -> int:
        (child,) = children(self.process.pid)
        return child

    def await_idle(self) -> dict[str, Any]:
        """Wait until nothing runs; every KV block has been returned by then."""
        deadline = time.monotonic() + 20
        while True:
            load = self.http.get("/load").json()
            if load["server_load"] == load["num_requests_running"] == load["num_requests_waiting"] == 0 and load["kv_cache_usage"] == 0.0:
                return load
            assert time.monotonic() < deadline, load
            time.sleep(0.02)

    def await_status(self, path: str, status: int) -> None:
        deadline = time.monotonic() + 20
        while (found := self.http.get(path).status_code) != status:
            assert time.monotonic() < deadline, f"{path} stayed {found}"
            time.sleep(0.02)

    def close(self) -> int:
        """SIGTERM; returns the exit code."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()
        if self._log is not None:
            self._log.close()
        return code

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_to_end(connection: socket.socket) -> bytes:
    """What a streamed answer holds from here to its [DONE], or to the end of the connection."""
    whole = bytearray()
    while b"[DONE]" not in whole[-200:] and (part := connection.recv(65536)):
        whole += part
    return bytes(whole)


def _move_clock() -> None:
    """Every clock that is not monotonic goes a day back."""
    real, real_datetime = time.time, datetime.datetime

    class Earlier(real_datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return real_datetime.now(tz) - datetime.timedelta(days=1)

    time.time = lambda: real() - 86400
    for module in list(sys.modules.values()):
        if getattr(module, "datetime", None) is real_datetime:
            module.datetime = Earlier  # type: ignore[attr-defined]


def _main() -> int:
    from llmc.runtime.server.main import serve
    from llmc.runtime.server.settings import ServerSettings
    from tests.server.serve_fake import load_model

    options = json.loads(sys.argv[1])
    signal.signal(signal.SIGUSR1, lambda _number, _frame: _move_clock())
    command = (sys.executable, str(Path(ROOT) / "benchmarks" / "overload.py"), "--engine")
    return serve(
        ServerSettings(artifact="none", engine=options["engine"], engine_command=command, **{"port": 0, **options["settings"]}),
        load_model=load_model,
    )


if __name__ == "__main__":
    sys.exit(_main())
