"""Faults put into a running server: what was asked ends with an answer or an error, and the next request is answered."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.reliability.served import LONG, Server, read_to_end
from tests.runtime.conftest import toy_folder, toy_weights  # noqa: F401
from tests.server.running import alive
from tests.server.test_real_engine import artifact  # noqa: F401


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def assert_serves(server: Server) -> None:
    assert server.complete().status_code == 200
    server.await_idle()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS])
def test_the_engine_killed_three_times(how: signal.Signals) -> None:
    with Server(step_s=0.01) as server:
        for _ in range(3):
            streams = [server.stream() for _ in range(5)]
            for stream in streams:
                assert stream.recv(65536).startswith(b"HTTP/1.1 200")
            engine = server.engine_pid()
            os.kill(engine, how)
            for stream in streams:
                end = read_to_end(stream)
                assert b"the engine stopped while working on this request" in end and b"[DONE]" in end
                stream.close()
            server.await_status("/health/ready", 200)
            assert not alive(engine)
            assert_serves(server)


def test_an_artifact_deleted_while_it_is_served(tmp_path: Path, artifact: Path, toy_weights: dict[str, np.ndarray]) -> None:  # noqa: F811
    """Everything of it is in memory or behind an open descriptor; only a restart of the engine needs it, and says so."""
    mine = tmp_path / "artifact"
    shutil.copytree(artifact, mine)
    command = [sys.executable, "-m", "llmc", "serve", str(mine), "--port", "0", "--max-num-seqs", "4"]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"llmc ready at (\S+) ", process.stdout.readline())
        assert found is not None, (tmp_path / "log").read_text()
        with httpx.Client(base_url=found[1], timeout=20) as client:
            before = client.post("/v1/completions", json={"prompt": [3, 4, 5], "max_tokens": 8}).json()["choices"]
            shutil.rmtree(mine)
            after = client.post("/v1/completions", json={"prompt": [3, 4, 5], "max_tokens": 8}).json()["choices"]
            assert before == after
            (engine,) = [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
            os.kill(engine, signal.SIGKILL)
            assert process.wait(30) != 0
    assert str(mine) in (tmp_path / "log").read_text() and "engine_given_up" in (tmp_path / "log").read_text()


def test_no_space_for_logs() -> None:
    """/dev/full refuses every byte with ENOSPC."""
    with open("/dev/full", "wb", buffering=0) as full, Server(log=full) as server:
        assert_serves(server)
        assert server.http.get("/nope").status_code == 404
        os.kill(server.engine_pid(), signal.SIGKILL)
        server.await_status("/health/ready", 503)
        server.await_status("/health/ready", 200)
        assert_serves(server)


def test_no_descriptors_left(server: Server) -> None:
    pid = server.process.pid
    assert_serves(server)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    refused = 0
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")), before[1]))
    try:
        for _ in range(20):
            try:
                with socket.create_connection(("127.0.0.1", server.port), timeout=0.2) as connection:
                    connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                    refused += not connection.recv(100).startswith(b"HTTP/1.1 200")
            except OSError:
                refused += 1
        assert server.complete().status_code == 200, "the connection that is open goes on"
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    assert refused > 0, "the limit did not bite, so nothing was tested"
    with httpx.Client(base_url=server.url, timeout=20) as fresh:
        assert fresh.get("/v1/models").status_code == 200
    assert_serves(server)


def test_the_wall_clock_jumps_back_a_day() -> None:
    with Server(step_s=0.01) as server:
        first = server.complete().json()["created"]
        stream = server.stream(max_tokens=60)
        os.kill(server.process.pid, signal.SIGUSR1)
        assert b'"finish_reason":"length"' in read_to_end(stream)
        stream.close()
        assert server.complete().json()["created"] < first - 80_000, "the clock was moved"
        assert server.http.get("/health/ready").status_code == 200
        assert_serves(server)
        metrics = server.http.get("/metrics").text
        assert not re.search(r"_seconds_sum\{[^}]*\} -", metrics), "a duration was measured on the wall clock"


def test_sigterm_under_load_loses_nothing() -> None:
    with Server(step_s=0.005, max_queue=256) as server:
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(httpx.post(f"{server.url}/v1/completions", json={"prompt": [1, 2], **LONG, "max_tokens": 40}, timeout=60))

        whole = [threading.Thread(target=ask) for _ in range(20)]
        streams = [server.stream(max_tokens=60) for _ in range(20)]
        for thread in whole:
            thread.start()
        for stream in streams:
            assert stream.recv(65536).startswith(b"HTTP/1.1 200")
        engine = server.engine_pid()
        server.http.close()
        os.kill(server.process.pid, signal.SIGTERM)
        ends = [read_to_end(stream) for stream in streams]
        for thread in whole:
            thread.join(60)
        assert all(b'"finish_reason":"length"' in end and b"[DONE]" in end for end in ends)
        # Those that came after the signal are told so; none is left without an answer.
        assert len(answers) == 20 and {answer.status_code for answer in answers} <= {200, 503}
        for stream in streams:
            stream.close()
        assert server.process.wait(30) == 0 and not alive(engine)


def test_killed_and_started_again_at_the_same_place(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    for _ in range(3):
        server = Server(uds=path)
        engine = server.engine_pid()
        assert server.complete().status_code == 200
        server.process.kill()
        server.process.wait(10)
        server.close()
        assert Path(path).exists(), "its socket stayed behind"
    with Server(uds=path) as server:
        assert server.complete().status_code == 200
        second = subprocess.run(
            [sys.executable, "-m", "tests.reliability.served", json.dumps({"settings": {"uds": path}, "engine": {"step_s": 0.01}})],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert second.returncode != 0 and "cannot listen on" in second.stderr, "a socket in use is not taken over"
        assert server.complete().status_code == 200
    assert not alive(engine)
