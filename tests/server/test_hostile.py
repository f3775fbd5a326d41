"""Hostile and broken requests: the right status, a short error in OpenAI's shape, and a normal request answered right after."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest

from llmc.runtime.server.schemas import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, RequestModel, TokenizeRequest
from tests.server.running import RunningServer, assert_error

MESSAGE = {"role": "user", "content": "hi"}
DEEP = '{"a":' * 99 + "1" + "}" * 99
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b'"text"', None),
        (b'{"prompt": "a", "temperature": NaN}', None),
        (b'{"prompt": "a", "temperature": Infinity}', None),
        (b'{"prompt": "\\ud800"}', None),
        (b'{"prompt": "\xff\xfe"}', None),
        (b"[" * 100_000, None),
        (b'{"prompt":' + b"[" * 500 + b"]" * 500 + b"}", None),
        (b'{"prompt": "a", "n": 0}', "n"),
        (b'{"prompt": "a", "n": 129}', "n"),
        (b'{"prompt": "a", "n": 1e2}', "n"),
        (b'{"prompt": "a", "n": true}', "n"),
        (b'{"prompt": "a", "max_tokens": -1}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": 100000000000000000000000}', "max_tokens"),
        (b'{"prompt": "a", "temperature": -0.1}', "temperature"),
        (b'{"prompt": "a", "top_p": 0}', "top_p"),
        (b'{"prompt": "a", "seed": 9223372036854775808}', "seed"),
        (b'{"prompt": "a", "stop": [""]}', "stop"),
        (b'{"prompt": "a", "stop": ["a","b","c","d","e","f","g","h","i","j","k","l","m","n","o","p","q"]}', "stop"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
        (b'{"prompt": "a", "logit_bias": {"400": 1}}', "logit_bias"),
        (b'{"prompt": "a", "logit_bias": {"1": 101}}', "logit_bias"),
        (b'{"prompt": "a", "stop_token_ids": [400]}', "stop_token_ids"),
        (b'{"prompt": "a", "logprobs": 21}', "logprobs"),
        (b'{"prompt": "a", "min_tokens": 20}', "min_tokens"),
        (b'{"prompt": [400]}', "prompt"),
        (b'{"prompt": [-1]}', "prompt"),
        (b'{"prompt": []}', "prompt"),
        (b'{"prompt": ""}', "prompt"),
        (b'{"prompt": [[]]}', "prompt"),
        (b'{"prompt": [1, "a"]}', "prompt"),
        (b'{"prompt": "a", "stream_options": {"include_usage": true}}', "stream_options"),
        (b'{"prompt": "a", "made_up": 1}', "made_up"),
        (b'{"prompt": "a", "best_of": 2}', "best_of"),
        (b'{"prompt": "a", "priority": 99999999999}', "priority"),
        (b"{}", "prompt"),
    ],
)
def test_bad_completion_bodies(server: RunningServer, body: bytes, param: str | None) -> None:
    answer = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert_error(answer, 400, param=param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 900}}]}]}, "messages"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a":' * 99 + "1" + "}" * 99}}]}]},
            None,
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{"type": "custom", "function": {"name": "f"}}]}]}, "messages"),
        ({"messages": [MESSAGE], "tools": [{}]}, "tools"),
        ({"messages": [MESSAGE], "tools": [{"type": "web_search"}]}, "tools"),
        ({"messages": [MESSAGE], "tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"messages": [MESSAGE], "tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}]}, "tools"),
        ({"messages": [MESSAGE], "tools": [TOOL, TOOL]}, "tools"),
        ({"messages": [MESSAGE], "tools": [TOOL] * 513}, "tools"),
        ({"messages": [MESSAGE], "tools": [TOOL]}, "tools"),
        ({"messages": [MESSAGE], "tool_choice": "required"}, "tool_choice"),
        ({"messages": [MESSAGE], "tools": [TOOL], "tool_choice": {"type": "function", "function": {}}}, "tool_choice"),
        ({"messages": [MESSAGE], "tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        ({"messages": [MESSAGE], "reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"messages": [MESSAGE], "functions": [{"name": "f"}]}, "functions"),
        ({"messages": [MESSAGE], "response_format": {"type": "xml"}}, "response_format"),
        ({"messages": [MESSAGE], "top_logprobs": 2}, "top_logprobs"),
        ({"messages": [MESSAGE], "chat_template": "{% for x in range(9) %}{% endfor %}"}, "chat_template"),
        ({"messages": [MESSAGE] * 5000}, "messages"),
    ],
)
def test_bad_chat_bodies(server: RunningServer, fields: dict[str, Any], param: str | None) -> None:
    assert_error(server.post("/v1/chat/completions", fields), 400, param=param)


NASTY = [0, -1, 1.5, 2**31, 2**63, -(2**63), 1e308, True, "", "x" * 5000, [], [[]], [None], [-1], [2**40], ["x"] * 2000, {}, {"x": {}}]


@pytest.mark.parametrize("model", [CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest])
def test_nasty_values_in_every_field_never_break_the_server(server: RunningServer, model: type[RequestModel]) -> None:
    path, base = {
        CompletionRequest: ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
        ChatCompletionRequest: ("/v1/chat/completions", {"messages": [MESSAGE], "max_tokens": 1}),
        TokenizeRequest: ("/tokenize", {"prompt": "a"}),
        DetokenizeRequest: ("/detokenize", {"tokens": [1]}),
    }[model]
    for name in model.model_fields:
        for value in NASTY:
            answer = server.http.post(path, content=json.dumps(base | {name: value}).encode(), headers={"content-type": "application/json"})
            if answer.status_code not in (200, 404):
                assert_error(answer, 400)


def test_products_are_bounded(server: RunningServer) -> None:
    assert_error(server.complete(["a"] * 3, n=128), 400, param="n")
    assert_error(server.complete(["a"] * 1025), 400, param="prompt")
    assert "n x prompts x" in assert_error(server.complete(n=128, allowed_token_ids=[7] * 40_000), 400, param="allowed_token_ids")


def test_context_length(server: RunningServer) -> None:
    assert_error(server.complete([105] * 512), 400, param="prompt", code="context_length_exceeded")
    assert_error(server.complete([105] * 500, max_tokens=13), 400, param="max_tokens", code="context_length_exceeded")
    assert server.complete([105] * 500, max_tokens=12).status_code == 200


def test_unknown_model_path_and_method(server: RunningServer) -> None:
    assert_error(server.complete("a", model="other"), 404, param="model", code="model_not_found")
    for path in ("/nope", "/v1/models/", "/v1", "//v1/models", "/docs", "/%2e%2e/etc/passwd"):
        assert server.http.get(path).status_code == 404, path
        assert_error(server.http.get(path), 404)
    answer = server.http.get("/v1/completions")
    assert_error(answer, 405)
    assert answer.headers["allow"] == "POST"
    assert_error(server.http.request("DELETE", "/v1/models"), 405)


def test_answers_never_repeat_the_input(server: RunningServer) -> None:
    secret = "S3CRET" * 30
    for body in (
        {"prompt": "a", "n": secret},
        {"prompt": {"a": secret}},
        {"prompt": "a", "stop": [[secret]]},
        {"prompt": ["a", {secret: 1}]},
    ):
        answer = server.post("/v1/completions", body)
        assert_error(answer, 400)
        assert "S3CRET" not in answer.text
    assert "S3CRET" not in server.log()


def test_body_limits(server: RunningServer) -> None:
    assert_error(server.complete("a" * 300_000), 413, code="body_too_large")

    def endless() -> Any:
        for _ in range(100):
            yield b"a" * 10_000

    try:
        answer = server.http.post("/v1/completions", content=endless(), headers={"content-type": "application/json"})
    except Exception as error:  # the server hung up while we were still sending, which is as good
        assert "disconnect" in str(error).lower() or "broken" in str(error).lower() or "reset" in str(error).lower()
    else:
        assert_error(answer, 413)


def test_content_type(server: RunningServer) -> None:
    answer = server.http.post("/v1/completions", content=b'{"prompt":"a"}', headers={"content-type": "text/plain"})
    assert_error(answer, 415)


def split(answer: bytes) -> tuple[int, dict]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 408),
        (b"GET /health HT", 408),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX-Half: ", 408),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{", 408),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", 408),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 9999999999999\r\n\r\n", 413),
        (b"NOT HTTP AT ALL\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-Big: " + b"a" * 70_000, 431),
    ],
)
def test_half_sent_and_broken_requests_are_closed(server: RunningServer, data: bytes, status: int) -> None:
    started = time.monotonic()
    found, body = split(server.raw(data).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b""))
    assert found == status and set(body["error"]) == {"message", "type", "param", "code"}
    assert time.monotonic() - started < 3


def test_a_second_half_request_on_a_kept_connection_is_closed(server: RunningServer) -> None:
    request = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = server.raw(request + request[:-4], timeout_s=5)
    assert answer.count(b"HTTP/1.1 200") == 1 and b"HTTP/1.1 408" in answer


@pytest.mark.parametrize("trailer", [b"x-one: " + b"a" * 1000 + b"\r\n", b"a" * 1000])
def test_trailers_without_end_are_cut(server: RunningServer, trailer: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx-first: ")
        sent = 0
        with pytest.raises(OSError, match=r"reset|pipe"):
            while sent < 20_000_000:
                connection.sendall(trailer * 50)
                sent += len(trailer) * 50


def test_trailers_are_no_headers(server: RunningServer) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    answer = server.raw(head + b"2\r\n{}\r\n0\r\nContent-Type: application/json\r\nX-Request-Id: mine\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 415 ") and b"x-request-id: mine" not in answer


def test_upgrade_to_websocket_is_answered(server: RunningServer) -> None:
    body = b'{"prompt":"a","max_tokens":1}'
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(head + body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_body_behind_an_upgrade_offer_is_read(server: RunningServer) -> None:
    """Java's HTTP client offers h2c so; the head and the body come in pieces."""
    body = b'{"prompt":"a","max_tokens":1}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        for piece in (head[:60], head[60:], body[:5], body[5:]):
            connection.sendall(piece)
            time.sleep(0.02)
        assert b"HTTP/1.1 200" in connection.recv(65536)


@pytest.mark.parametrize("host", [b"", b"evil.example/..", b"a b", b"x\xff", b"[::1"])
def test_odd_hosts(server: RunningServer, host: bytes) -> None:
    answer = server.raw(b"GET /nope HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
    assert split(answer)[0] in (400, 404)


def test_log_lines_cannot_be_forged(server: RunningServer) -> None:
    server.http.get("/%0a%7b%22event%22:%22forged%22%7d")
    server.raw(b"GET /\xe2\x80\xa8forged HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    for line in server.log().splitlines():
        assert json.loads(line)["event"] != "forged"


def test_idle_connections_do_not_stop_others(server: RunningServer) -> None:
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
    assert server.complete().status_code == 200
    for connection in idle:
        connection.close()
