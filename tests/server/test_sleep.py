"""Sleep and wake: the engine's memory is given back and taken again, and no request is lost without a word."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import httpx
import pytest

from tests.server.running import RunningServer, alive, assert_error, children

LONG = {"ignore_eos": True, "max_tokens": 60}


@pytest.fixture(scope="module")
def sleeper() -> Iterator[RunningServer]:
    with RunningServer(engine={"step_ms": 10}, settings={"enable_sleep_mode": True}) as running:
        yield running


def test_there_is_no_sleep_unless_asked_for(server: RunningServer) -> None:
    for path in ("/sleep", "/wake_up"):
        assert_error(server.http.post(path), 404)
    assert_error(server.http.get("/is_sleeping"), 404)


def test_sleeping_ends_the_engine_and_waking_starts_one(sleeper: RunningServer) -> None:
    for _ in range(3):
        engine = sleeper.engine_pid()
        before = sleeper.complete(seed=1).json()["choices"]
        assert sleeper.http.get("/is_sleeping").json() == {"is_sleeping": False}
        assert sleeper.http.post("/sleep").json() == {"is_sleeping": True}
        assert not alive(engine) and children(sleeper.process.pid) == []
        assert sleeper.http.post("/sleep").status_code == 200, "twice is as good as once"
        assert sleeper.http.get("/is_sleeping").json() == {"is_sleeping": True}
        refused = sleeper.complete()
        assert_error(refused, 503, code="sleeping")
        assert refused.headers["retry-after"]
        assert_error(sleeper.http.get("/health/ready"), 503, code="not_ready_sleeping")
        assert sleeper.http.get("/health/live").status_code == sleeper.http.get("/v1/models").status_code == 200
        assert sleeper.http.get("/metrics").status_code == 200 and sleeper.http.get("/load").json()["state"] == "sleeping"
        assert sleeper.http.post("/wake_up").json() == {"is_sleeping": False}
        assert sleeper.http.get("/health/ready").status_code == 200
        assert sleeper.complete(seed=1).json()["choices"] == before
        assert sleeper.http.post("/wake_up").status_code == 200
    assert 'llmc:engine_restarts{model_name="tiny"} 0.0' in sleeper.http.get("/metrics").text


def test_running_requests_finish_first(sleeper: RunningServer) -> None:
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(sleeper.complete("x", **LONG))) for _ in range(3)]
    for thread in threads:
        thread.start()
    sleeper.wait_for_load(3, 3)
    assert sleeper.http.post("/sleep").status_code == 200
    for thread in threads:
        thread.join(20)
    assert [answer.status_code for answer in answers] == [200] * 3
    assert all(answer.json()["usage"]["completion_tokens"] == 60 for answer in answers)
    assert sleeper.http.post("/wake_up").status_code == 200


def test_a_request_that_does_not_finish_in_time_is_told() -> None:
    with RunningServer(engine={"step_ms": 50}, settings={"enable_sleep_mode": True, "shutdown_timeout_s": 0.2}) as server:
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(server.complete("x", **LONG)))
        thread.start()
        server.wait_for_load(1, 1)
        assert server.http.post("/sleep").status_code == 200
        thread.join(20)
        assert "put to sleep" in assert_error(answers[0], 503)


def test_an_engine_that_does_not_come_back_leaves_a_sleeping_server(tmp_path) -> None:  # type: ignore[no-untyped-def]
    gate = tmp_path / "closed"
    with RunningServer(engine={"fail_if": str(gate)}, settings={"enable_sleep_mode": True}) as server:
        server.http.post("/sleep")
        gate.touch()
        for _ in range(2):
            message = assert_error(server.http.post("/wake_up"), 500, code="wake_failed")
            assert "format_version 99" in message
            assert server.http.get("/is_sleeping").json() == {"is_sleeping": True}
        gate.unlink()
        assert server.http.post("/wake_up").status_code == 200
        assert server.complete().status_code == 200


def test_a_sleeping_server_ends_cleanly() -> None:
    server = RunningServer(settings={"enable_sleep_mode": True})
    server.http.post("/sleep")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 0
    server.stop()


def test_a_server_that_falls_asleep_can_be_told_to_end() -> None:
    server = RunningServer(engine={"step_ms": 20}, settings={"enable_sleep_mode": True, "shutdown_timeout_s": 60})
    answers: list[httpx.Response] = []
    running = threading.Thread(target=lambda: answers.append(server.complete("x", **LONG)))
    running.start()
    server.wait_for_load(1, 1)
    falling = threading.Thread(target=lambda: answers.append(httpx.post(server.url + "/sleep", timeout=60)))
    falling.start()
    server.wait_for("/health/ready", 503)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    running.join(20)
    falling.join(20)
    assert answers[0].status_code == 200
    assert_error(answers[1], 503, code="draining")
    server.stop()


def test_an_engine_killed_while_it_falls_asleep(sleeper: RunningServer) -> None:
    import os

    done: list[httpx.Response] = []
    running = threading.Thread(target=lambda: sleeper.complete("x", **LONG))
    running.start()
    sleeper.wait_for_load(1, 1)
    falling = threading.Thread(target=lambda: done.append(sleeper.http.post("/sleep")))
    falling.start()
    sleeper.wait_for("/health/ready", 503)
    os.kill(sleeper.engine_pid(), signal.SIGKILL)
    falling.join(20)
    running.join(20)
    assert done[0].status_code == 200
    assert sleeper.http.post("/wake_up").status_code == 200 and sleeper.complete().status_code == 200
