"""What an operator looks at and sets: llmc top, dashboards, traces, the start's trace, stream interval, TLS, defaults."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmc.cli import main
from llmc.errors import ConfigError
from llmc.runtime.messages import GenerateRequest, SamplingParams, TokenEvent
from llmc.runtime.server.settings import ServerSettings
from llmc.runtime.server.startup_trace import startup_events
from llmc.runtime.stream_interval import StreamInterval
from tests.server.running import ROOT, RunningServer


def test_top_shows_a_running_server(server: RunningServer, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    server.complete(max_tokens=8)
    assert main(["top", "--url", server.url, "--frames", "2", "--interval", "0.1", "--svg", str(tmp_path / "top.svg")]) == 0
    shown = capsys.readouterr().out
    for words in ("tiny", "ready", "KV cache", "tokens/s", "first token", "p99", "length", "200"):
        assert words in shown, words
    picture = (tmp_path / "top.svg").read_text()
    assert picture.startswith("<svg") and "KV&#160;cache" in picture


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--url", "http://127.0.0.1:9", "--frames", "1"], "does not answer"),
        (["--url", "localhost:8000"], "expected an address"),
        (["--svg", "x.svg"], "--frames"),
    ],
)
def test_top_says_what_is_wrong(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", *arguments]) != 0
    assert problem in capsys.readouterr().err


def test_top_asks_with_the_key(capsys: pytest.CaptureFixture[str]) -> None:
    with RunningServer(settings={"api_keys": ["secret"]}) as server:
        assert main(["top", "--url", server.url, "--frames", "1"]) != 0
        assert "--api-key" in capsys.readouterr().err
        assert main(["top", "--url", server.url, "--frames", "1", "--api-key", "secret"]) == 0


def test_dashboards_ask_for_metrics_that_exist(server: RunningServer) -> None:
    server.complete()
    there = set(re.findall(r"^(llmc:\w+)", server.http.get("/metrics").text, re.MULTILINE))
    files = sorted((ROOT / "dashboards").glob("*.json"))
    assert files
    for file in files:
        board = json.loads(file.read_text())
        asked = set(re.findall(r"llmc:\w+", " ".join(t["expr"] for panel in board["panels"] for t in panel["targets"])))
        assert len(asked) > 10 and asked <= there, asked - there
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


class _Collector(http.server.BaseHTTPRequestHandler):
    received: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        self.received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """An OTLP collector: its URL and what it was sent."""
    received: list[tuple[str, bytes]] = []
    handler = type("Collector", (_Collector,), {"received": received})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", received
        running.shutdown()
        thread.join()


def test_traces_reach_a_collector(collector: tuple[str, list[tuple[str, bytes]]]) -> None:
    messages = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="needs the extra otel")
    url, received = collector
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with RunningServer(settings={"otlp_traces_endpoint": url}) as server:
        server.post("/v1/completions", {"prompt": "private words", "max_tokens": 4}, headers={"traceparent": parent})
        server.complete(n=-1)
        server.complete(stream=True, max_tokens=3)
        assert server.stop() == 0
    spans = []
    for path, body in received:
        assert path == "/v1/traces" and b"private" not in body
        request = messages.ExportTraceServiceRequest.FromString(body)
        spans += [span for r in request.resource_spans for scope in r.scope_spans for span in scope.spans]
    found = [s for s in spans if s.name == "POST /v1/completions"]
    assert len(found) == 3
    ours = next(s for s in found if s.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c")
    assert ours.parent_span_id.hex() == "b7ad6b7169203331"
    values = {a.key: a.value for a in ours.attributes}
    assert values["gen_ai.usage.completion_tokens"].int_value == 4 and values["http.response.status_code"].int_value == 200
    assert 0 < values["gen_ai.latency.time_to_first_token"].double_value <= values["gen_ai.latency.e2e"].double_value
    assert sorted({a.key: a.value for a in s.attributes}["http.response.status_code"].int_value for s in found) == [200, 200, 400]


def test_a_collector_that_is_not_there_costs_no_request() -> None:
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")
    with RunningServer(settings={"otlp_traces_endpoint": "http://127.0.0.1:9/v1/traces"}) as server:
        assert server.complete().status_code == 200


def test_opentelemetry_is_imported_only_when_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "modules.json"
    server = RunningServer(modules_to=str(out))
    server.complete()
    assert server.stop() == 0
    assert not [name for name in json.loads(out.read_text()) if name.startswith(("opentelemetry", "fastapi"))]


def test_the_start_is_traced(tmp_path: Path) -> None:
    file = tmp_path / "start.json"
    with RunningServer(settings={"trace_startup": str(file)}) as server:
        server.wait_for("/health/ready", 200)
        server.await_log('"event":"(ready)"')
        events = json.loads(file.read_text())["traceEvents"]
    names = {event["args"]["name"]: event["pid"] for event in events if event["ph"] == "M"}
    whole = [event for event in events if event["ph"] == "X"]
    assert {"spawn", "imports", "tokenizer"} <= {e["name"] for e in whole if e["pid"] == names["front"]}
    assert {"interpreter", "fake"} <= {e["name"] for e in whole if e["pid"] == names["engine"]}
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in whole)


def test_stages_lie_where_they_ran() -> None:
    engine = {"interpreter": 40.0, "verify": 10.0, "load.code": 20.0, "load.weights": 30.0, "load": 35.0, "canary": 5.0}
    events = {e["name"]: e for e in startup_events({"spawn": 2.0}, engine, front_pid=1, engine_pid=2, total_ms=150.0) if e["ph"] == "X"}
    assert events["canary"]["ts"] + events["canary"]["dur"] == 150_000
    assert events["load"]["ts"] == events["load.code"]["ts"] == events["load.weights"]["ts"] == 110_000
    assert events["load.code"]["tid"] != events["load.weights"]["tid"]
    assert events["imports"]["ts"] + events["imports"]["dur"] == events["verify"]["ts"]


def test_a_trace_that_cannot_be_written_is_refused_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trace_startup"):
        ServerSettings(artifact="x", engine={}, trace_startup=str(tmp_path / "none" / "x.json"))


def _tokens(*ids: int, end: str | None = None) -> TokenEvent:
    return TokenEvent(request_id="r", token_ids=list(ids), finish_reason=end)  # type: ignore[arg-type]


def test_tokens_are_held_until_enough_are_there() -> None:
    interval = StreamInterval(3)
    assert interval.pass_on([_tokens(1)]) == [_tokens(1)], "the first at once"
    assert interval.pass_on([_tokens(2)]) == interval.pass_on([_tokens(3)]) == []
    assert interval.pass_on([_tokens(4)]) == [_tokens(2, 3, 4)]
    assert interval.pass_on([_tokens(5)]) == []
    assert interval.pass_on([_tokens(6, end="stop")]) == [_tokens(5, 6, end="stop")], "the end at once"
    interval.pass_on([_tokens(1)])
    interval.pass_on([_tokens(2)])
    assert interval.pass_on([_tokens(end="abort")]) == [_tokens(2), _tokens(end="abort")]
    interval.begin(GenerateRequest(request_id="r", prompt_token_ids=[1], sampling=SamplingParams(stop=["x"])))
    for token in range(5):
        assert interval.pass_on([_tokens(token)]) == [_tokens(token)], "stop strings are looked for token by token"


def test_a_stop_string_ends_a_sequence_whatever_the_stream_interval() -> None:
    with RunningServer(settings={"stream_interval": 100}, engine={"step_ms": 10}) as held:
        answer = held.complete(stop=["wor"], max_tokens=400, ignore_eos=True)
        assert answer.json()["choices"][0]["stop_reason"] == "wor"
        held.wait_for_load(0, 0)
        found = re.search(r"llmc:engine_steps_total\{.*\} (\S+)", held.http.get("/metrics").text)
        assert found is not None and float(found[1]) < 90


def test_the_stream_interval_makes_fewer_chunks_of_the_same_text(server: RunningServer) -> None:
    def chunks(at: RunningServer, **fields: Any) -> list[str]:
        text = at.complete(stream=True, max_tokens=17, ignore_eos=True, **fields).text
        return [json.loads(line[6:])["choices"][0]["text"] for line in text.splitlines() if line.startswith("data: {")]

    with RunningServer(settings={"stream_interval": 4}) as held:
        few, many = chunks(held), chunks(server)
        assert "".join(few) == "".join(many) and len(many) == 17 and len(few) == 5
        whole = held.complete(max_tokens=17, ignore_eos=True, logprobs=1).json()
        assert whole["usage"]["completion_tokens"] == 17 and len(whole["choices"][0]["logprobs"]["tokens"]) == 17


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1, with its key in the same file."""
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_text((folder / "cert.pem").read_text() + (folder / "key.pem").read_text())
    return both


def test_https(certificate: Path) -> None:
    import ssl

    with RunningServer(settings={"ssl_certfile": str(certificate)}) as server:
        assert server.url.startswith("https://")
        with httpx.Client(base_url=server.url, verify=ssl.create_default_context(cafile=str(certificate))) as client:
            assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(server.url.replace("https", "http") + "/version")


def test_a_certificate_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text("nothing")
    for name in ("bad.pem", "missing.pem"):
        argument = json.dumps({"settings": {"ssl_certfile": str(tmp_path / name)}, "engine": {"reply_ids": [5]}})
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", "tests.server.serve_fake", argument], capture_output=True, text=True, env=environment, timeout=60
        )
        assert done.returncode != 0 and "the certificate and key cannot be used" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"served_model_names": ("",)}, "served model name is empty"),
        ({"ssl_keyfile": "x"}, "need ssl_certfile"),
        ({"ssl_certfile": "x", "ssl_cert_reqs": 2}, "ssl_ca_certs"),
        ({"stream_interval": 0}, "stream_interval"),
        ({"override_generation_config": {"best_of": 2}}, "best_of is no sampling default"),
        ({"override_generation_config": {"temperature": -1}}, "temperature is -1"),
        ({"override_generation_config": {"top_k": True}}, "top_k is True"),
        ({"override_generation_config": {"top_p": float("nan")}}, "top_p is nan"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        ServerSettings(artifact="x", engine={}, **fields)


def test_overridden_sampling_defaults_act() -> None:
    with RunningServer(settings={"override_generation_config": {"max_new_tokens": 3}}) as server:
        assert server.chat().json()["usage"]["completion_tokens"] == 3


def test_a_monotonic_clock_stands_behind_the_figures(server: RunningServer) -> None:
    before = time.monotonic()
    answer = server.complete(return_metrics=True).json()
    assert answer["metrics"]["end_to_end_ms"] <= (time.monotonic() - before) * 1000
