"""POST /v1/messages: shapes, events, history, errors; read by the anthropic client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from llmc.runtime.server.message_blocks import MessageBlocks
from llmc.runtime.server.schemas_messages import CountTokensRequest, MessagesRequest
from llmc.runtime.text import Piece
from tests.server.running import REPLY, TOKENIZER, WORDS, RunningServer, assert_error
from tests.server.test_hostile import NASTY
from tests.server.test_schemas import walk
from tests.server.test_tools import CALL, ECHO, FORCED, THINKS, WEATHER

anthropic = pytest.importorskip("anthropic", reason="the anthropic client is in the dev extra")

TOOL = {"name": "weather", "description": "d", "input_schema": WEATHER["function"]["parameters"]}
NUM_REPLY = len(TOKENIZER.encode(REPLY))


@pytest.fixture(scope="module")
def keyed() -> Iterator[RunningServer]:
    settings = {"chat_template": ECHO + "{# {{ enable_thinking }} #}{{ enable_thinking }}", "api_keys": ["secret-key"]}
    with RunningServer(settings=settings, engine={"max_model_len": 1024, "step_ms": 0}) as running:
        yield running


@pytest.fixture(scope="module")
def client(keyed: RunningServer) -> Any:
    return anthropic.Anthropic(base_url=keyed.url, api_key="secret-key", max_retries=0, timeout=20)


def ask(client: Any, text: str, **fields: Any) -> Any:
    return client.messages.create(**{"model": "tiny", "max_tokens": 300, "messages": [{"role": "user", "content": text}], **fields})


def post(server: RunningServer, **fields: Any) -> Any:
    return server.post("/v1/messages", {"model": "tiny", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}], **fields})


def test_text(server: RunningServer) -> None:
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    body = post(server, system=system, metadata={"user_id": "me"}, temperature=0.5, top_k=3, top_p=0.5).json()
    prompt = TOKENIZER.encode("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert body.pop("id").startswith("msg_")
    assert body == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": REPLY, "citations": None}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(prompt) - 4,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 4,
            "output_tokens": NUM_REPLY,
        },
    }


def test_ways_to_end(server: RunningServer) -> None:
    cut = post(server, max_tokens=2).json()
    assert (cut["stop_reason"], cut["stop_sequence"], cut["usage"]["output_tokens"]) == ("max_tokens", None, 2)
    stopped = post(server, stop_sequences=["how", "zzz"]).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "how")
    assert stopped["content"][0]["text"] == REPLY.partition("how")[0]


def test_thinking_and_calls(client: Any) -> None:
    answer = ask(client, THINKS, tools=[TOOL], tool_choice={"type": "auto"})
    assert [block.type for block in answer.content] == ["thinking", "text", "tool_use", "tool_use"]
    thinking, text, first, second = answer.content
    assert (thinking.thinking, text.text, first.name) == ("hm", "One moment.", "weather")
    assert [first.input, second.input] == [{"city": "Rome"}, {"city": "Oslo"}] and first.id != second.id
    assert answer.stop_reason == "tool_use"
    one = ask(client, THINKS, tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block.type for block in one.content] == ["thinking", "text", "tool_use"]
    forced = ask(client, FORCED, tools=[TOOL], tool_choice={"type": "any"})
    assert [block.type for block in forced.content] == ["tool_use"] * 2
    named = ask(client, FORCED, tools=[TOOL], tool_choice={"type": "tool", "name": "weather"})
    assert named.content[0].input == forced.content[0].input
    cut = ask(client, CALL, tools=[TOOL], max_tokens=40)
    assert cut.stop_reason == "max_tokens" and [block.type for block in cut.content] == ["text"]


def test_thinking_can_be_left_out(client: Any) -> None:
    for thinking in ({"type": "disabled"}, {"type": "adaptive", "display": "omitted"}):
        assert [block.type for block in ask(client, "<think>hm</think>Yes", thinking=thinking).content] == ["text"]
    thought = ask(client, "<think>hm</think>Yes", thinking={"type": "enabled", "budget_tokens": 1024})
    assert [block.type for block in thought.content] == ["thinking", "text"]


def test_a_stream_holds_the_same(client: Any) -> None:
    fields: dict[str, Any] = {"model": "tiny", "max_tokens": 300, "messages": [{"role": "user", "content": THINKS}], "tools": [TOOL]}
    whole = client.messages.create(**fields)
    events = list(client.messages.create(**fields, stream=True))
    assert events[0].type == "message_start" and [e.type for e in events[-2:]] == ["message_delta", "message_stop"]
    assert events[0].message.usage.input_tokens == whole.usage.input_tokens
    assert events[-2].delta.stop_reason == "tool_use" and events[-2].usage.output_tokens == whole.usage.output_tokens
    open_blocks: list[int] = []
    for event in events[1:-2]:
        if event.type == "content_block_start":
            assert not open_blocks
            open_blocks.append(event.index)
        elif event.type == "content_block_delta":
            assert open_blocks == [event.index]
        else:
            assert event.type == "content_block_stop" and open_blocks.pop() == event.index
    assert sum(e.type == "content_block_delta" and e.delta.type == "input_json_delta" for e in events) > 8
    with client.messages.stream(**fields) as streamed:
        final = streamed.get_final_message()
    plain = [[block.model_dump(exclude={"id"}) for block in message.content] for message in (final, whole)]
    assert plain[0] == plain[1]


def test_history_and_results(client: Any) -> None:
    """The answer goes back as it came, with the tool's result."""
    first = ask(client, THINKS, tools=[TOOL])
    calls = [block for block in first.content if block.type == "tool_use"]
    results: list[Any] = [{"type": "tool_result", "tool_use_id": call.id, "content": "Sunny."} for call in calls]
    results[1]["content"] = [{"type": "text", "text": "Rain."}]
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [*results, {"type": "text", "text": "So?"}]},
    ]
    again = ask(client, "", messages=messages, tools=[TOOL], max_tokens=600)
    (text,) = again.content
    said = text.text
    assert all(f'{call.id} weather {{"city": "{call.input["city"]}"}}' in said for call in calls)
    assert "(hm)" in said and said.index("assistant") < said.index("tool" + calls[0].id) < said.index("tool" + calls[1].id) < said.index(
        "So?"
    )


def test_neighbours_of_one_role_are_one_turn(server: RunningServer) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
    joined = [{"role": "user", "content": "a\nb"}]
    counts = [
        server.post("/v1/messages/count_tokens", {"model": "tiny", "messages": m}).json()["input_tokens"]
        for m in (turns, joined, [{"role": "user", "content": "a"}])
    ]
    assert counts[0] == counts[1] > counts[2]


def test_a_last_turn_of_the_assistant_is_continued(server: RunningServer) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
    body = post(server, messages=messages).json()
    prompt = TOKENIZER.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nWell, ")
    assert body["usage"]["input_tokens"] + 4 == len(prompt) and body["content"][0]["text"] == REPLY


def test_count_tokens(client: Any) -> None:
    messages = [{"role": "user", "content": "hello"}]
    answer = ask(client, "hello", system="Be brief.", tools=[TOOL], max_tokens=1)
    counted = client.messages.count_tokens(model="tiny", messages=messages, system="Be brief.", tools=[TOOL])
    assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens


def test_errors(client: Any, keyed: RunningServer) -> None:
    with pytest.raises(anthropic.BadRequestError) as bad:
        ask(client, "x", max_tokens=100_000)
    assert bad.value.body["type"] == "error" and bad.value.body["error"]["type"] == "invalid_request_error"
    assert "context" in bad.value.body["error"]["message"]
    with pytest.raises(anthropic.NotFoundError):
        ask(client, "x", model="other")
    with pytest.raises(anthropic.AuthenticationError):
        ask(anthropic.Anthropic(base_url=keyed.url, api_key="wrong", max_retries=0), "x")
    bearer = anthropic.Anthropic(base_url=keyed.url, auth_token="secret-key", api_key=None, max_retries=0)
    assert ask(bearer, "Yes").content[0].text == "Yes"
    two_keys = [("x-api-key", "secret-key"), ("x-api-key", "secret-key")]
    refused = keyed.http.post("/v1/messages", json={}, headers=two_keys).json()
    assert (refused["type"], refused["error"]["type"]) == ("error", "authentication_error")
    with pytest.raises(anthropic.APIError, match="failed alone"):
        list(ask(client, "Yes yes" + WORDS["token_error"], stream=True))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]}, "messages"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"service_tier": "standard_only"}, "service_tier"),
        ({"container": "x"}, "container"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences"),
    ],
)
def test_bad_bodies(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    answer = post(server, **fields)
    assert answer.status_code == 400 and len(answer.content) < 4096, answer.text
    body = answer.json()
    assert (body["type"], body["error"]["type"], body["error"]["param"]) == ("error", "invalid_request_error", param)


@pytest.mark.parametrize(
    ("method", "path", "sent", "status", "kind"),
    [
        ("GET", "/v1/messages", {}, 405, "invalid_request_error"),
        ("POST", "/v1/messages/batches", {"json": {}}, 404, "not_found_error"),
        ("POST", "/v1/messages", {"data": {"a": "b"}}, 415, "invalid_request_error"),
        ("POST", "/v1/messages", {"content": b" " * 200_001}, 413, "request_too_large"),
        (
            "POST",
            "/v1/messages/count_tokens",
            {"content": b"{", "headers": {"content-type": "application/json"}},
            400,
            "invalid_request_error",
        ),
    ],
)
def test_whoever_refuses_does_it_in_their_frame(
    server: RunningServer, method: str, path: str, sent: dict[str, Any], status: int, kind: str
) -> None:
    answer = server.http.request(method, path, **sent)
    assert (answer.status_code, answer.json()["type"], answer.json()["error"]["type"]) == (status, "error", kind)
    assert_error(server.http.request(method, path.replace("messages", "no_messages"), **sent), 404 if status in (400, 405) else status)


def test_a_full_server_says_when_to_come_back() -> None:
    with RunningServer(settings={"max_queue": 1, "max_sequences_per_request": 1}, engine={"start_s": 3}, wait=False) as server:
        answer = post(server)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "2"
        assert answer.json()["error"]["type"] == "overloaded_error"


def test_an_output_schema_becomes_response_format(server: RunningServer) -> None:
    answer = post(server, output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}})
    assert answer.status_code == 200 and answer.json()["content"][0]["text"] == REPLY  # the fake engine knows no grammars
    effort = post(server, output_config={"effort": "low"})
    assert effort.status_code == 400 and effort.json()["error"]["param"] == "output_config"


def test_arguments_that_are_no_object_are_text() -> None:
    for arguments in ("[1]", '{"a":' * 2000 + "1" + "}" * 2000):
        blocks = MessageBlocks()
        for piece in (Piece("call", "f", 0), Piece("arguments", arguments, 0)):
            blocks.add(piece, "call_1")
        assert blocks.content() == [{"type": "text", "text": arguments, "citations": None}]


def test_every_field_is_bounded() -> None:
    assert walk(MessagesRequest) == [] and walk(CountTokensRequest) == []


def test_nasty_values_in_every_field(server: RunningServer) -> None:
    for name in MessagesRequest.model_fields:
        for value in NASTY:
            answer = post(server, **{"max_tokens": 1, name: value})
            assert answer.status_code in (200, 400, 404) and len(answer.content) < 4096, (name, answer.text)
            assert answer.status_code == 200 or json.loads(answer.text)["type"] == "error"


def test_openapi_describes_the_bodies(server: RunningServer) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]
    for path, name in (("/v1/messages", "MessagesRequest"), ("/v1/messages/count_tokens", "CountTokensRequest")):
        body = paths[path]["post"]["requestBody"]
        assert body["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{name}"}
