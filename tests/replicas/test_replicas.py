"""Several servers behind one address: routing, a replica killed under load, metrics, draining, refusals."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from llmc.cli.top import View, draw, look
from llmc.errors import ConfigError
from llmc.runtime.replicas.main import replica_settings, serve_replicas
from llmc.runtime.replicas.process import ReplicaProcess
from llmc.runtime.server.settings import ServerSettings
from tests.replicas.serving import Replicas
from tests.server.running import alive, assert_error, children

_NO_RAY = None if importlib.util.find_spec("ray") else "Ray Serve is not installed: pip install 'llmc[ray]'"
ENGINES = ["process", pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.skipif(_NO_RAY is not None, reason=str(_NO_RAY))])]
LONG = {"max_tokens": 60, "ignore_eos": True}


@pytest.fixture(scope="module")
def served() -> Iterator[Replicas]:
    with Replicas(step_ms=5) as replicas:
        yield replicas


def test_answers_as_one_server_does(served: Replicas) -> None:
    whole = served.complete()
    assert whole.status_code == 200
    text = whole.json()["choices"][0]["text"]
    with served.stream() as connection:
        events = _read(connection)
    pieces = [json.loads(event)["choices"][0]["text"] for event in re.findall(r"data: (\{.*\})", events)]
    assert "".join(pieces) == text and events.rstrip().endswith("0") is True
    assert_error(served.http.post("/v1/completions", json={"prompt": "hi", "max_tokens": -1}), 400)
    assert_error(served.http.get("/nowhere"), 404)
    assert served.http.get("/v1/models").json()["data"][0]["id"] == "tiny"


def test_a_head_without_a_body_is_a_whole_answer(served: Replicas) -> None:
    answer = served.http.head("/v1/models")
    assert (answer.status_code, answer.content) == (200, b"")
    assert all(replica["ready"] for replica in served.load()["replicas"])


def test_a_client_that_expects_100_continue_gets_its_answer(served: Replicas) -> None:
    body = b'{"prompt": "hi"}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nConnection: close\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        connection.sendall(head + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert connection.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.makefile("rb").readline().startswith(b"HTTP/1.1 200 ")


def test_requests_spread_over_the_replicas(served: Replicas) -> None:
    connections = [served.stream(**LONG) for _ in range(4)]
    load = served.await_load(lambda found: found["server_load"] == 4)
    assert [replica["open_requests"] for replica in load["replicas"]] == [2, 2]
    for connection in connections:
        assert "[DONE]" in _read(connection)
        connection.close()


def test_a_client_that_leaves_ends_its_request_in_the_replica(served: Replicas) -> None:
    connection = served.stream(max_tokens=400, ignore_eos=True)
    served.await_load(lambda found: found["server_load"] == 1)
    connection.close()
    served.await_load(lambda found: found["server_load"] == 0)
    deadline = time.monotonic() + 20
    while "llmc:num_requests_running" in (text := _running_samples(served)) and not set(re.findall(r" (\d+\.\d)", text)) <= {"0.0"}:
        assert time.monotonic() < deadline, text
        time.sleep(0.05)


def test_metrics_are_those_of_every_replica(served: Replicas) -> None:
    for _ in range(4):
        assert served.complete(max_tokens=2).status_code == 200
    text = served.http.get("/metrics").text
    assert {'llmc:replica_ready{replica="0"} 1.0', 'llmc:replica_ready{replica="1"} 1.0'} <= set(text.splitlines())
    generated = re.findall(r'llmc:generation_tokens_total\{[^}]*replica="(\d)"[^}]*\} (\S+)', text)
    assert {index for index, count in generated if float(count) > 0} == {"0", "1"}
    assert text.count("# TYPE llmc:generation_tokens_total ") == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_replica_killed_under_load_loses_only_what_it_computed(engine: str) -> None:
    with Replicas(engine=engine, step_ms=20) as served:
        answers: list[tuple[int, Any]] = []
        streams = [served.stream(**LONG) for _ in range(4)]  # have begun: these two replicas compute them
        begun = [connection.recv(1) for connection in streams]
        assert begun == [b"H"] * 4
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                answer = served.complete(max_tokens=8)
                answers.append((answer.status_code, answer.json()))

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for client in clients:
            client.start()
        victim = _victim(served, engine)
        os.kill(victim, signal.SIGKILL)
        ends = [_read(connection) for connection in streams]
        served.await_load(lambda found: all(replica["ready"] for replica in found["replicas"]))
        stop.set()
        for client in clients:
            client.join()
        assert not alive(victim)
        # A request whose answer had not begun was computed again elsewhere: no client saw anything but an answer
        assert len(answers) > 8 and {status for status, _ in answers} == {200}, answers[-1]
        assert all(answer["usage"]["completion_tokens"] == 8 for _, answer in answers)
        # Of the streams, those of the lost replica ended with an error in OpenAI's shape, the others whole
        lost = [end for end in ends if "replica_lost" in end]
        whole = [end for end in ends if "replica_lost" not in end]
        assert len(lost) == 2 and len(whole) == 2
        for end in lost:
            (error,) = [json.loads(event) for event in re.findall(r"data: (\{.*\})", end) if '"error"' in event]
            assert set(error["error"]) == {"message", "type", "param", "code"} and "[DONE]" in end
        assert all('"finish_reason":"length"' in end and "[DONE]" in end for end in whole)
        for connection in streams:
            connection.close()
        assert served.complete(max_tokens=2).status_code == 200
        assert served.stop() == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_draining_answers_what_runs_and_refuses_what_comes(engine: str) -> None:
    with Replicas(engine=engine, step_ms=20) as served:
        server = _victim(served, engine)
        running = [served.stream(**LONG) for _ in range(2)]
        served.await_load(lambda found: found["server_load"] == 2)
        served.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 20
        while served.http.get("/health/ready").status_code == 200:
            assert time.monotonic() < deadline
        assert served.http.get("/health/live").status_code == 200
        assert_error(served.complete(), 503, code="draining")
        for connection in running:
            end = _read(connection)
            assert '"finish_reason":"length"' in end and "[DONE]" in end
            connection.close()
        assert served.stop() == 0
        assert not alive(server)


@pytest.mark.slow
def test_without_a_ready_replica_the_answer_is_503_and_each_comes_back() -> None:
    with Replicas() as served:
        for pid in served.replica_pids():
            os.kill(pid, signal.SIGSTOP)  # they are there and answer nothing: lost once killed
        for pid in served.replica_pids():
            os.kill(pid, signal.SIGKILL)
        answers = [served.complete(max_tokens=1)]
        while answers[-1].status_code != 200:
            assert_error(answers[-1], 503)
            assert answers[-1].headers["retry-after"] and len(answers) < 2000
            time.sleep(0.01)
            answers.append(served.complete(max_tokens=1))
        served.await_load(lambda found: all(replica["ready"] for replica in found["replicas"]))


@pytest.mark.slow
def test_the_front_dies_and_no_replica_stays() -> None:
    with Replicas() as served:
        pids = served.replica_pids()
        engines = [child for pid in pids for child in children(pid)]
        assert len(pids) == 2 and len(engines) == 2
        served.process.kill()
        deadline = time.monotonic() + 20
        while any(map(alive, pids + engines)):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_keys_are_asked_for_and_handed_on() -> None:
    with Replicas(count=1, api_keys=["secret"]) as served:
        assert_error(served.complete(), 401, code="invalid_api_key")
        assert_error(served.http.get("/metrics"), 401)
        assert served.http.get("/health").status_code == 200
        key = {"authorization": "Bearer secret"}
        assert served.http.post("/v1/completions", json={"prompt": "hi"}, headers=key).status_code == 200
        assert "llmc:generation_tokens_total{" in served.http.get("/metrics", headers=key).text


def test_a_replica_that_cannot_start_ends_the_server_with_its_exit_code() -> None:
    command = [sys.executable, "-m", "llmc", "serve", "/nonexistent/artifact", "--replicas", "2", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4 and "/nonexistent/artifact" in done.stderr


def test_a_replica_that_cannot_be_started_now_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_args: object, **_fields: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    replica = ReplicaProcess(ServerSettings(artifact="none", engine={}), (sys.executable, "-c", "pass"))
    try:
        first = replica.pid
        replica.process.wait(20)
        replica.was_ready, replica._start_at = True, 0.0
        with monkeypatch.context() as patched:
            patched.setattr(subprocess, "Popen", no_memory)
            assert asyncio.run(replica.check()) is False and replica.pid == first
        replica._start_at = 0.0
        assert asyncio.run(replica.check()) is False and replica.pid != first
    finally:
        replica.kill()


def test_top_watches_all_of_them(served: Replicas) -> None:
    served.await_load(lambda found: all(replica["ready"] for replica in found["replicas"]))
    sample = look(served.url, None)
    assert sample.load == {"state": "ready", "num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage": 0.0}
    assert draw(View(url=served.url, now=sample)) is not None


def test_each_replica_gets_its_share_and_no_address() -> None:
    settings = ServerSettings(artifact="a", engine={"artifact": "a", "memory_utilization": 0.8, "threads": None}, port=1234)
    given = replica_settings(settings, 2)
    assert given.engine["memory_utilization"] == pytest.approx(0.4)
    assert given.engine["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
    assert given.port == 8000 and settings.engine["memory_utilization"] == 0.8
    told = ServerSettings(artifact="a", engine={"artifact": "a", "num_blocks": 7, "threads": 3}, port=1234)
    assert replica_settings(told, 2).engine == told.engine


def test_what_acts_on_one_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="--enable-sleep-mode acts on one server's engine"):
        serve_replicas(ServerSettings(artifact="a", engine={}, enable_sleep_mode=True), 2, "process")


@pytest.mark.skipif(_NO_RAY is None, reason="Ray Serve is installed")
def test_without_ray_its_engine_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'llmc\[ray\]'"):
        serve_replicas(ServerSettings(artifact="a", engine={}, port=0), 2, "ray")


def _victim(served: Replicas, engine: str) -> int:
    """The process of a replica: its server, or the Ray actor that holds it."""
    if engine == "process":
        return served.replica_pids()[0]
    found = re.search(r'"event":"placed","replica":0,"pid":(\d+)', served.log_path.read_text())
    assert found is not None, served.log_path.read_text()
    return int(found[1])


def _running_samples(served: Replicas) -> str:
    lines = served.http.get("/metrics").text.splitlines()
    return "\n".join(line for line in lines if line.startswith("llmc:num_requests_running{"))


def _read(connection: Any) -> str:
    """To the end of a chunked answer."""
    whole = bytearray()
    while not whole.endswith(b"0\r\n\r\n") and (part := connection.recv(65536)):
        whole += part
    return whole.decode()
