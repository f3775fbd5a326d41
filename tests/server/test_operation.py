"""Keys, queues, disconnects, an engine that dies, and a clean end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import msgspec
import pytest
import zmq

from llmc.runtime.engine_client import EngineClient
from llmc.runtime.engine_spawn import EngineHandle
from llmc.runtime.messages import AbortRequest, SamplingParams, TokenEvent
from llmc.runtime.request_stream import RequestStream
from llmc.runtime.server.generation import ClientGone, Generation
from llmc.runtime.server.metrics import Metrics
from tests.server.running import TOKENIZER, WORDS, RunningServer, alive, assert_error, children

LONG = {"ignore_eos": True, "max_tokens": 400}


def request_bytes(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def open_stream(server: RunningServer, **fields: Any) -> socket.socket:
    """A streamed request whose first bytes have arrived."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(request_bytes("/v1/completions", {"prompt": "x", "stream": True, **LONG, **fields}))
    assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    return connection


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
        if b"[DONE]" in b"".join(parts[-2:]):
            break
    return b"".join(parts)


@pytest.fixture(scope="module")
def slow() -> Any:
    """A server whose steps take 20 ms."""
    with RunningServer(engine={"step_ms": 20}, settings={"max_queue": 4}) as running:
        yield running


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"stream": False}])
def test_a_client_that_leaves_frees_its_sequences_at_once(slow: RunningServer, fields: dict[str, Any]) -> None:
    if fields.get("stream") is False:
        connection = socket.create_connection(("127.0.0.1", slow.port), timeout=10)
        connection.sendall(request_bytes("/v1/completions", {"prompt": "x", **LONG}))
        slow.wait_for_load(1, 1)
    else:
        connection = open_stream(slow, **fields)
    connection.close()
    left = time.monotonic()
    slow.wait_for_load(0, 0)
    assert time.monotonic() - left < 4  # a step is 20 ms; 400 tokens take 8 s


def test_a_pipelined_request_does_not_hide_the_disconnect(slow: RunningServer) -> None:
    connection = open_stream(slow)
    connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
    time.sleep(0.1)
    connection.close()
    slow.wait_for_load(0, 0)


def test_a_full_queue_answers_429(slow: RunningServer) -> None:
    streams = [open_stream(slow, n=4) for _ in range(3)]  # 8 run, 4 wait
    answer = slow.complete()
    assert_error(answer, 429, code="queue_full")
    assert int(answer.headers["retry-after"]) >= 1
    for stream in streams:
        stream.close()
    slow.wait_for_load(0, 0)
    assert slow.complete(max_tokens=1).status_code == 200


def test_a_slow_reader_is_cut(slow: RunningServer) -> None:
    # Each event of 20 top log-probabilities is about 2 kB; the socket's buffers hold a little, then the client stands still.
    with RunningServer(engine={"step_ms": 0, "max_model_len": 100_000}) as fast:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", fast.port))
        body = {"prompt": "x", "stream": True, "ignore_eos": True, "max_tokens": 90_000, "logprobs": 20}
        connection.sendall(request_bytes("/v1/completions", body))
        fast.await_log('"event":"(slow_reader_cut)"', timeout_s=90)
        fast.wait_for_load(0, 0)
        connection.close()


def test_a_client_that_leaves_while_its_answer_waits_to_be_sent() -> None:
    """Its sequences end while nobody waits for them: the answer is not over, and must not be taken for whole."""

    async def leave() -> None:
        left, stream = asyncio.Event(), RequestStream(["r-0"], lambda _: None)

        async def receive() -> dict[str, str]:
            await left.wait()
            return {"type": "http.disconnect"}

        client = SimpleNamespace(submit=lambda _: stream, abort_stream=lambda s: s.close(), stats=None)
        model, settings = SimpleNamespace(tokenizer=TOKENIZER), SimpleNamespace(engine={})
        front: Any = SimpleNamespace(model=model, settings=settings, client=client, metrics=Metrics("tiny", cast(Any, client)))
        request: Any = SimpleNamespace(scope={"llmc.request_id": "r", "llmc.abort": None}, receive=receive)
        generation = Generation(front, request, [[105]], SamplingParams())
        stream.put(TokenEvent(request_id="r-0", token_ids=[106]))
        deltas = generation.deltas()
        assert (await anext(deltas))[0].token_ids == [106]
        left.set()
        await asyncio.sleep(0.01)  # the answer's send would wait here
        with pytest.raises(ClientGone):
            await anext(deltas)

    asyncio.run(leave())


def test_a_reader_is_not_slow_because_the_engine_is_fast() -> None:
    # The engine is ahead of the front from the first step on: more than 10,000 events of one request wait at some time.
    with RunningServer(engine={"step_ms": 0, "max_model_len": 1000}) as fast:
        answer = fast.complete(n=128, max_tokens=100, ignore_eos=True)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 12_800


@pytest.fixture(scope="module")
def locked() -> Iterator[RunningServer]:
    with RunningServer(settings={"api_keys": ["key"], "keep_alive_timeout_s": 1.0, "header_timeout_s": 1.0}) as running:
        yield running


def test_api_keys() -> None:
    with RunningServer(settings={"api_keys": ["first key", "second"], "root_path": "/llm"}) as server:
        for path in (
            "/v1/models",
            "/metrics",
            "/nope",
            "/load",
            "/version",
            "/openapi.json",
            "/health/../v1/models",
            "/healthx",
            "/health/",
        ):
            answer = server.http.get(path)
            assert_error(answer, 401, code="invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/health/live", "/health/ready", "/llm/health"):
            assert server.http.get(path).status_code == 200
        for value in ("Bearer wrong", "Bearer", "second", "Basic second", "Bearer first key", "bearer second"):
            expected = 200 if value in ("Bearer first key", "bearer second") else 401
            assert server.http.get("/v1/models", headers={"Authorization": value}).status_code == expected, value
        twice = [("Authorization", "Bearer second"), ("Authorization", "Bearer wrong")]
        assert server.http.get("/v1/models", headers=twice).status_code == 401
        crafted = server.raw(b"GET /v1/models HTTP/1.1\r\nHost: x/health?\r\nConnection: close\r\n\r\n")
        assert b" 401 " in crafted.split(b"\r\n")[0]
        good = {"Authorization": "Bearer second"}
        assert server.post("/v1/completions", {"prompt": "x"}, headers=good).status_code == 200
        assert server.post("/llm/v1/completions", {"prompt": "x"}, headers=good).status_code == 200
        assert "second" not in server.log() and "second" not in Path(f"/proc/{server.engine_pid()}/cmdline").read_text()


@pytest.mark.parametrize("rest", [b"", b"0123456789"])
def test_a_refused_request_does_not_hold_its_connection(locked: RunningServer, rest: bytes) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"
    with socket.create_connection(("127.0.0.1", locked.port), timeout=10) as connection:

        def answer_to(request: bytes) -> bytes:
            connection.sendall(request)
            data = b""
            while not data.endswith(b"}"):
                data += connection.recv(4096)
            return data

        assert answer_to(head).startswith(b"HTTP/1.1 401 ")
        if rest:  # with its body whole, the connection may be used again
            connection.sendall(rest)
            assert answer_to(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 200 ")
            assert answer_to(head).startswith(b"HTTP/1.1 401 ")
            connection.sendall(rest)
        assert connection.recv(4096) == b""


def test_cross_origin_only_where_allowed(server: RunningServer) -> None:
    origin = {"Origin": "https://page.example"}
    assert "access-control-allow-origin" not in server.http.get("/version", headers=origin).headers
    with RunningServer(settings={"allowed_origins": ["https://page.example"], "api_keys": ["k"]}) as open_server:
        preflight = origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        assert open_server.http.options("/v1/completions", headers=preflight).status_code == 200
        assert open_server.http.get("/health", headers=origin).headers["access-control-allow-origin"] == "https://page.example"


@pytest.mark.parametrize("how", ["kill -9", "segmentation fault", "crash"])
def test_engine_death_reaches_every_open_request_and_the_engine_returns(how: str) -> None:
    with RunningServer(engine={"step_ms": 20, "start_s": 0.3}) as server:
        streams = [open_stream(server) for _ in range(3)]
        whole: list[httpx.Response] = []
        waiting = threading.Thread(target=lambda: whole.append(server.complete("y", **LONG)))
        waiting.start()
        server.wait_for_load(4, 4)
        engine = server.engine_pid()
        if how == "crash":
            assert_error(server.complete("x" + WORDS["crash"]), 500)
        else:
            os.kill(engine, signal.SIGKILL if how == "kill -9" else signal.SIGSEGV)
        for stream in streams:
            text = read_all(stream)
            assert b'"error":{"message":"the engine stopped while working on this request' in text and b"[DONE]" in text
        waiting.join(10)
        assert_error(whole[0], 500)
        answer = server.wait_for("/health/ready", 503)
        assert_error(answer, 503)
        assert server.http.get("/health/live").status_code == 200
        refused = server.complete()
        assert_error(refused, 503)
        assert refused.headers["retry-after"]
        server.wait_for("/health/ready", 200)
        assert server.complete().status_code == 200
        assert not alive(engine) and server.engine_pid() != engine
        assert "llmc:engine_restarts" in server.http.get("/metrics").text
        if how == "segmentation fault":
            assert "engine_process.py" in server.log(), "the log says where the engine was"


def test_an_abort_that_finds_the_queue_full_is_sent_later() -> None:
    class Queue:
        """The socket of an engine that takes nothing in at first."""

        full, answers, taken = True, 1, list[str]()

        def send(self, data: bytes, flags: int) -> asyncio.Future[None]:
            sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            if self.full:
                sent.set_exception(zmq.Again())
            else:
                self.taken.append(msgspec.msgpack.decode(data, type=AbortRequest).request_id)
                sent.set_result(None)
            return sent

        async def recv(self) -> bytes:
            self.answers -= 1
            if self.answers < 0:
                raise EOFError
            return msgspec.msgpack.encode([])

    async def run() -> list[str]:
        queue = Queue()
        client = EngineClient(list, max_waiting=9, hang_s=60.0, log=print)  # type: ignore[arg-type]
        client._socket = queue  # type: ignore[assignment]
        stream = RequestStream(["a", "b"], lambda _stream: None)
        client._open = dict.fromkeys(stream.request_ids, stream)
        client.abort_stream(stream)
        assert queue.taken == [] and client.num_open == 0
        queue.full = False
        with pytest.raises(EOFError):
            await client._receive(queue, [])  # type: ignore[arg-type]
        await client.close()
        return queue.taken

    assert asyncio.run(run()) == ["a", "b"]


def test_a_front_that_cannot_speak_with_its_engine_gives_up() -> None:
    async def run() -> tuple[str, int] | None:
        with subprocess.Popen(["sleep", "60"]) as process:
            client = EngineClient(lambda: handle, max_waiting=1, hang_s=60.0, log=lambda *_args, **_fields: None)
            handle = EngineHandle(process=process, directory="", endpoint="ipc:///no/such/folder/engine", spawned_at=0.0, spawn_ms=0.0)
            client.start(handle)
            await asyncio.wait_for(client.gave_up.wait(), 20)
            await client.close()
            process.kill()
            return client.failure

    message, code = asyncio.run(run()) or ("", 0)
    assert "ZMQError" in message and code == 70


def test_an_engine_that_keeps_dying_ends_the_server() -> None:
    with RunningServer(engine={"step_ms": 1}) as server:
        for _ in range(6):
            server.wait_for("/health/ready", 200)
            server.complete("x" + WORDS["die"])
            if server.process.poll() is not None:
                break
            time.sleep(0.05)
        assert server.process.wait(20) != 0
        assert "engine_given_up" in server.log()


def test_a_hanging_step_is_not_ready_and_is_restarted() -> None:
    with RunningServer(settings={"stall_timeout_s": 0.5, "hang_timeout_s": 2.0}) as server:
        answer: list[httpx.Response] = []
        waiting = threading.Thread(target=lambda: answer.append(server.complete("x" + WORDS["hang"])))
        waiting.start()
        assert_error(server.wait_for("/health", 503), 503, code="not_ready_ready")
        waiting.join(10)
        assert_error(answer[0], 500)
        server.wait_for("/health", 200)


def test_loading_answers_503() -> None:
    with RunningServer(engine={"start_s": 1.5}, wait=False) as server:
        answer = server.complete()
        assert_error(answer, 503, code="loading")
        assert answer.headers["retry-after"]
        assert server.http.get("/health/live").status_code == 200 and server.http.get("/health/ready").status_code == 503
        assert server.http.get("/v1/models").status_code == 200
        server.wait_for("/health/ready", 200)


def test_a_refused_artifact_ends_the_server_with_its_own_code() -> None:
    server = RunningServer(engine={"fail_start": True}, wait=False)
    assert server.process.wait(10) == 4
    assert "format_version 99 is newer" in server.log()
    server.stop()


def test_sigterm_drains() -> None:
    with RunningServer(engine={"step_ms": 20}) as server:
        engine = server.engine_pid()
        stream = open_stream(server, max_tokens=150)
        os.kill(server.process.pid, signal.SIGTERM)
        server.wait_for("/health/ready", 503)
        refused = server.complete()
        assert_error(refused, 503, code="draining")
        assert refused.headers["retry-after"]
        text = read_all(stream)
        assert b"[DONE]" in text and b'"finish_reason":"length"' in text and b'"error"' not in text
        stream.close()
        server.http.close()
        assert server.process.wait(10) == 0
        assert not alive(engine)


def test_the_drain_has_an_end() -> None:
    with RunningServer(engine={"step_ms": 20}, settings={"shutdown_timeout_s": 0.3}) as server:
        engine = server.engine_pid()
        stream = open_stream(server)
        started = time.monotonic()
        os.kill(server.process.pid, signal.SIGTERM)
        assert b"did not finish this request in time" in read_all(stream)
        stream.close()
        assert server.process.wait(10) == 0 and time.monotonic() - started < 5
        assert not alive(engine)


def test_sigterm_while_loading_ends_at_once() -> None:
    with RunningServer(engine={"start_s": 30}, wait=False) as server:
        (engine,) = children(server.process.pid)
        assert server.stop() == 0
        assert not alive(engine)


def test_a_killed_front_leaves_no_engine() -> None:
    server = RunningServer()
    engine = server.engine_pid()
    server.process.kill()
    server.process.wait()
    deadline = time.monotonic() + 5
    while alive(engine) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(engine)
    server.stop()


def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with RunningServer(settings={"uds": str(path)}) as server:
        assert path.stat().st_mode & 0o777 == 0o600
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x") as client:
            assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        assert server.ready_line.startswith(f"llmc ready at unix:{path}")
    assert not path.exists()


def test_the_front_imports_nothing_heavy(tmp_path: Path) -> None:
    out = tmp_path / "modules.json"
    server = RunningServer(modules_to=str(out))
    server.chat()
    assert server.stop() == 0
    modules = set(json.loads(out.read_text()))
    heavy = {"torch", "transformers", "sympy", "triton", "jinja2", "numpy", "requests", "websockets", "llmc.compiler"}
    assert not heavy & modules, heavy & modules


def test_prompts_are_not_logged() -> None:
    with RunningServer(settings={"log_level": "debug"}) as server:
        server.chat("a very private sentence", user="private person")
        server.complete("a very private sentence" + WORDS["bug"])
        assert_error(server.complete("a very private boom"), 500)
        server.await_log('"request_failed",.*("error":"KeyError")')
        assert "private" not in server.log() and "secret words" not in server.log()
