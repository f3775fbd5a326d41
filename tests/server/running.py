"""Real server processes for the tests."""

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
from pathlib import Path
from typing import Any

import httpx

from llmc.runtime.text import Tokenizer
from tests.server.tiny_tokenizers import byte_level_json

ROOT = Path(__file__).parents[2]
TOKENIZER = Tokenizer.from_bytes(byte_level_json())
REPLY = "Hello world, how are you today?"
# A prompt with one of these words makes the fake engine misbehave; each is one token of its own.
TRIGGERS = {
    name: TOKENIZER.encode(char)[0]
    for name, char in {
        "die": "~",
        "hang": "^",
        "bug": "`",
        "crash": "@",
        "reject": "#",
        "token_error": "$",
        "parrot": "%",
        "say": "&",
    }.items()
}
WORDS = {name: TOKENIZER.decode([token]) for name, token in TRIGGERS.items()}


class RunningServer:
    """`tests.server.serve_fake` in its own process; its log goes to a file."""

    def __init__(self, *, settings: dict[str, Any] | None = None, engine: dict[str, Any] | None = None, wait: bool = True, **options: Any):
        self.log_path = Path(tempfile.mkstemp(prefix="llmc-test-", suffix=".log")[1])
        engine = {"reply_ids": TOKENIZER.encode(REPLY), "triggers": TRIGGERS, "eos": 2, **(engine or {})}
        argument = json.dumps({"settings": settings or {}, "engine": engine, **options})
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.server.serve_fake", argument], stdout=subprocess.PIPE, stderr=log, env=environment
            )
        self.url = self.await_log(r'"event":"listening","url":"([^"]+)"')
        if wait:
            self.ready_line = self.process.stdout.readline().decode()  # type: ignore[union-attr]
        self.port = int(self.url.rsplit(":", 1)[1]) if self.url.startswith("http") else 0
        self.http = httpx.Client(base_url=self.url, timeout=20) if self.port else httpx.Client(timeout=20)

    def await_log(self, pattern: str, timeout_s: float = 30.0) -> str:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if match := re.search(pattern, self.log()):
                return match[1]
            assert self.process.poll() is None, self.log()
            time.sleep(0.02)
        raise AssertionError(f"no {pattern} in the log: {self.log()}")

    def log(self) -> str:
        return self.log_path.read_text()

    def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        return self.http.post(path, json=body, **kwargs)

    def chat(self, content: str = "hi", **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields})

    def complete(self, prompt: Any = "hi", **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, **fields})

    def raw(self, data: bytes, *, timeout_s: float = 10.0) -> bytes:
        """Send bytes on a fresh connection and read until it is closed."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as connection:
            connection.sendall(data)
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
            return b"".join(parts)

    def engine_pid(self) -> int:
        (child,) = children(self.process.pid)
        return child

    def wait_for(self, path: str, status: int, timeout_s: float = 20.0) -> httpx.Response:
        deadline = time.monotonic() + timeout_s
        while True:
            answer = self.http.get(path)
            if answer.status_code == status:
                return answer
            assert time.monotonic() < deadline, f"{path} stayed {answer.status_code}"
            time.sleep(0.02)

    def wait_for_load(self, num_open: int, running: int, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            load = self.http.get("/load").json()
            if (load["server_load"], load["num_requests_running"]) == (num_open, running):
                return
            assert time.monotonic() < deadline, load
            time.sleep(0.01)

    def stop(self) -> int:
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=20)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.log_path.unlink()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_error(answer: httpx.Response, status: int, *, param: str | None = None, code: str | None = None) -> str:
    """The error shape of every refusal; returns the message."""
    assert answer.status_code == status, answer.text
    assert len(answer.content) < 4096
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text and "0x" not in answer.text
    if param is not None:
        assert body["error"]["param"] == param, body
    if code is not None:
        assert body["error"]["code"] == code, body
    return body["error"]["message"]
