"""`llmc serve --replicas` for the tests: the real front before servers with the fake engine.

`python -m tests.replicas.serving front '{"count": 2, "engine": "process", "settings": ...}'` is the front's process; with `child` it is
a replica's, which reads its settings from stdin as the real one does.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from tests.server.running import REPLY, ROOT, TOKENIZER, TRIGGERS, children

FAKE = (sys.executable, "-m", "tests.replicas.serving", "child")


class Replicas:
    """A running front with replicas; use it with `with`."""

    def __init__(self, *, count: int = 2, engine: str = "process", step_ms: float = 1.0, python: str = sys.executable, **settings: Any):
        argument = json.dumps({"count": count, "engine": engine, "step_ms": step_ms, "settings": settings})
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.log_path = Path(tempfile.mkstemp(prefix="llmc-test-", suffix=".log")[1])
        with self.log_path.open("wb") as log:
            command = [python, "-m", "tests.replicas.serving", "front", argument]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, cwd=ROOT)
        assert self.process.stdout is not None
        found = None
        while found is None:
            line = self.process.stdout.readline().decode()
            assert line, (self.process.wait(20), self.log_path.read_text())
            found = re.search(r"llmc ready at (\S+) ", line)
        self.url = found[1]
        self.port = int(self.url.rsplit(":", 1)[1])
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def complete(self, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": "hi", **fields})

    def stream(self, **fields: Any) -> socket.socket:
        """A connection on which a streamed answer has been asked for."""
        body = json.dumps({"prompt": "hi", "stream": True, **fields}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(head.encode() + body)
        return connection

    def replica_pids(self) -> list[int]:
        """Of the servers, for engine "process"."""
        return sorted(children(self.process.pid))

    def load(self) -> dict[str, Any]:
        return self.http.get("/load").json()

    def await_load(self, check: Any, timeout_s: float = 60.0) -> dict[str, Any]:
        """Wait until `check(load)` is true."""
        deadline = time.monotonic() + timeout_s
        while not check(load := self.load()):
            assert time.monotonic() < deadline, load
            time.sleep(0.02)
        return load

    def stop(self) -> int:
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.log_path.unlink()


def _front(options: dict[str, Any]) -> int:
    from llmc.runtime.replicas.main import serve_replicas
    from llmc.runtime.server.settings import ServerSettings

    engine = {"reply_ids": TOKENIZER.encode(REPLY), "triggers": TRIGGERS, "eos": 2, "step_ms": options["step_ms"]}
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in options["settings"].items()}
    return serve_replicas(
        ServerSettings(artifact="none", port=0, engine=engine, **fields), options["count"], options["engine"], command=FAKE
    )


def _child() -> int:
    from llmc.runtime.replicas.child import end_with_parent, read_settings
    from llmc.runtime.server.main import serve
    from tests.server.serve_fake import load_model

    settings = read_settings()
    end_with_parent()
    for name in ("threads", "memory_utilization"):  # the fake engine has neither
        settings.engine.pop(name)
    return serve(replace(settings, engine_command=(sys.executable, "-m", "tests.server.fake_engine")), load_model=load_model)


if __name__ == "__main__":
    sys.exit(_child() if sys.argv[1] == "child" else _front(json.loads(sys.argv[2])))
