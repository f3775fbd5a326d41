"""POST /v1/responses: shapes, events, items in the history; read by the openai client."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmc.runtime.server.openai_responses import _as_chat
from llmc.runtime.server.parse import parse_body
from llmc.runtime.server.schemas_responses import ResponsesRequest
from tests.server.running import REPLY, TOKENIZER, WORDS, RunningServer, assert_error
from tests.server.test_hostile import NASTY
from tests.server.test_schemas import walk
from tests.server.test_tools import CALL, FORCED, THINKS, WEATHER, client, tooled  # noqa: F401

FLAT = {"type": "function", **WEATHER["function"]}
EXPECTED = ["reasoning", "message", "function_call", "function_call"]


def respond(server: RunningServer, text: Any, **fields: Any) -> dict[str, Any]:
    answer = server.post("/v1/responses", {"input": text, "max_output_tokens": 300, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_text(server: RunningServer) -> None:
    body = server.post("/v1/responses", {"input": "hi", "instructions": "Be brief.", "metadata": {"a": "b"}}).json()
    (item,) = body["output"]
    assert (item["type"], item["role"], item["content"][0]["text"], item["status"]) == ("message", "assistant", REPLY, "completed")
    prompt = TOKENIZER.encode("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert body["usage"]["input_tokens"] == len(prompt) and body["usage"]["output_tokens"] == len(TOKENIZER.encode(REPLY))
    assert body["usage"]["input_tokens_details"] == {"cached_tokens": 4}
    assert body["status"] == "completed" and body["metadata"] == {"a": "b"} and body["instructions"] == "Be brief."


def test_cut_off(server: RunningServer) -> None:
    body = server.post("/v1/responses", {"input": "hi", "max_output_tokens": 2}).json()
    assert body["status"] == "incomplete" and body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["output"][-1]["status"] == "incomplete"
    stream = server.post("/v1/responses", {"input": "hi", "max_output_tokens": 2, "stream": True}).text
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
    assert events[-1]["type"] == "response.incomplete" and events[-1]["response"]["output"] == [events[-2]["item"]]


def test_what_vllm_and_clients_send_besides(server: RunningServer) -> None:
    """Fields of sampling act as in chat; the rest asks for nothing."""
    fields: dict[str, Any] = {"seed": 1, "top_k": 3, "repetition_penalty": 1.1, "priority": 0, "cache_salt": "s", "prompt_cache_key": "k"}
    nothing: dict[str, Any] = {"store": False, "background": False, "include": [], "service_tier": "auto", "safety_identifier": "me"}
    nothing |= {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
    body = respond(server, "hi", stop=["world"], **fields, **nothing)
    assert body["output"][0]["content"][0]["text"] == REPLY.partition("world")[0] and body["status"] == "completed"


def test_items(tooled: RunningServer) -> None:  # noqa: F811
    body = respond(tooled, THINKS, tools=[FLAT])
    assert [item["type"] for item in body["output"]] == EXPECTED
    reasoning, message, first, second = body["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm"}] and message["content"][0]["text"] == "One moment."
    assert [c["arguments"] for c in (first, second)] == ['{"city": "Rome"}', '{"city": "Oslo"}']
    assert first["call_id"] != second["call_id"] and body["usage"]["output_tokens_details"]["reasoning_tokens"] >= 1
    forced = respond(tooled, FORCED, tools=[FLAT], tool_choice={"type": "function", "name": "weather"})
    assert [item["type"] for item in forced["output"]] == ["function_call"] * 2
    broken = respond(tooled, CALL[:-16], tools=[FLAT])
    assert [item["type"] for item in broken["output"]] == ["message"] and broken["output"][0]["content"][0]["text"] == CALL[:-16]


def test_the_openai_client_reads_it(client: Any) -> None:  # noqa: F811
    fields: dict[str, Any] = {"model": "tiny", "input": THINKS, "tools": [FLAT], "max_output_tokens": 300}
    whole = client.responses.create(**fields)
    assert whole.output_text == "One moment." and [item.type for item in whole.output] == EXPECTED
    events = list(client.responses.create(**fields, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"] and events[-1].type == "response.completed"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "One moment."
    assert "".join(e.delta for e in events if e.type == "response.reasoning_text.delta") == "hm"
    assert [e.arguments for e in events if e.type == "response.function_call_arguments.done"] == [
        c.arguments for c in whole.output if c.type == "function_call"
    ]
    added, done = ([e for e in events if e.type == f"response.output_item.{what}"] for what in ("added", "done"))
    assert [e.item.type for e in added] == [e.item.type for e in done] == EXPECTED
    assert [e.item.id for e in done] == [item.id for item in events[-1].response.output]
    with client.responses.stream(**fields) as streamed:
        assert streamed.get_final_response().output_text == "One moment."
    # The answer goes back as it came, with the tool's result.
    call = whole.output[2]
    history: list[Any] = [{"role": "user", "content": "x"}, *whole.output]
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."})
    again = client.responses.create(model="tiny", input=history, tools=[FLAT], max_output_tokens=400)
    assert again.output_text.endswith("Sunny.") and call.call_id in again.output_text and "(hm)" in again.output_text


def test_an_error_in_a_stream(server: RunningServer) -> None:
    answer = server.post("/v1/responses", {"input": "x" + WORDS["token_error"], "stream": True, "max_output_tokens": 9})
    errors = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith('data: {"error"')]
    assert [e["error"]["message"] for e in errors] == ["this sequence failed alone"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]}, "input"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "store": True}, "store"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "x", "include": ["file_search_call.results"]}, "include"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "model": "other"}, "model"),
    ],
)
def test_bad_bodies(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    assert_error(server.post("/v1/responses", fields), 404 if param == "model" else 400, param=param)


def test_the_form_of_the_text_becomes_response_format() -> None:
    def form(**fields: Any) -> Any:
        body = parse_body(json.dumps({"input": "x", "text": {"format": fields}}).encode(), ResponsesRequest)
        return _as_chat(body)["response_format"]

    schema = {"type": "object", "properties": {"a": {"default": None}}}
    named = form(type="json_schema", name="n", schema=schema, strict=True)
    assert named == {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    assert form(type="json_object") == {"type": "json_object"}


def test_every_field_is_bounded() -> None:
    assert walk(ResponsesRequest) == []


def test_nasty_values_in_every_field(server: RunningServer) -> None:
    for name in ResponsesRequest.model_fields:
        for value in NASTY:
            answer = server.post("/v1/responses", {"input": "a", "max_output_tokens": 1, name: value})
            if answer.status_code not in (200, 404):
                assert_error(answer, 400)


def test_openapi_describes_the_body(server: RunningServer) -> None:
    body = server.http.get("/openapi.json").json()["paths"]["/v1/responses"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ResponsesRequest"}
