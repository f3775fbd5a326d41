"""Reasoning and tool calls through the server: shapes, streams, prompts, the openai client's own reading of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import tokenizers

from llmc.errors import ConfigError
from llmc.runtime.server.parse import parse_body
from llmc.runtime.server.schemas import ChatCompletionRequest
from llmc.runtime.server.served_model import reply_formats
from llmc.runtime.server.settings import ServerSettings
from llmc.runtime.server.tool_choice import forced_calls
from llmc.runtime.text import TextStream, Tokenizer
from tests.server.running import WORDS, RunningServer, assert_error
from tests.server.test_api import events
from tests.server.tiny_tokenizers import CHATML, byte_level_json

openai = pytest.importorskip("openai", reason="the openai client is in the dev extra")

# The last message's text is the reply: the fake engine says what stands before the word.
ECHO = (
    "{% for m in messages %}{% if loop.last %}{{ m.content }}{{ '" + WORDS["say"] + "' }}{% endif %}"
    "{% if m.tool_calls %}[{% for c in m.tool_calls %}{{ c.id }} {{ c.function.name }} "
    "{{ c.function.arguments | tojson }}{% endfor %}]{% endif %}"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.role }}{{ m.tool_call_id }}{% endfor %}"
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{{ reasoning_effort }}{# <think> </think> <tool_call> </tool_call> arguments #}"
)
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
THINKS = f"<think>\nhm\n</think>\n\nOne moment.\n{CALL}\n{CALL.replace('Rome', 'Oslo')}"


@pytest.fixture(scope="module")
def tooled() -> Iterator[RunningServer]:
    settings = {"chat_template": ECHO, "enable_auto_tool_choice": True, "enable_tokenizer_info_endpoint": True}
    with RunningServer(settings=settings, engine={"max_model_len": 1024, "step_ms": 0}) as running:
        yield running


@pytest.fixture(scope="module")
def client(tooled: RunningServer) -> Any:
    return openai.OpenAI(base_url=f"{tooled.url}/v1", api_key="x", max_retries=0, timeout=20)


def ask(server: RunningServer, text: str, **fields: Any) -> dict[str, Any]:
    answer = server.chat(text, **{"max_tokens": 300} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_calls_and_reasoning_in_an_answer(tooled: RunningServer) -> None:
    choice = ask(tooled, THINKS, tools=[WEATHER], tool_choice="auto")
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == "One moment." and message["reasoning"] == message["reasoning_content"] == "hm"
    assert [c["function"] for c in message["tool_calls"]] == [
        {"name": "weather", "arguments": '{"city": "Rome"}'},
        {"name": "weather", "arguments": '{"city": "Oslo"}'},
    ]
    ids = [c["id"] for c in message["tool_calls"]]
    assert len(set(ids)) == 2 and all(i.startswith("call_") for i in ids)


@pytest.mark.parametrize("text", ['{"a": 1}', THINKS])
def test_a_reply_that_a_grammar_forms_is_content(tooled: RunningServer, text: str) -> None:
    """Also where the prompt or the text would make it reasoning or a call."""
    message = ask(tooled, text, tools=[WEATHER], response_format={"type": "json_object"})["message"]
    assert message["content"] == text and not message["reasoning"] and "tool_calls" not in message


def test_one_call_only(tooled: RunningServer) -> None:
    choice = ask(tooled, THINKS, tools=[WEATHER], parallel_tool_calls=False)
    assert [json.loads(c["function"]["arguments"])["city"] for c in choice["message"]["tool_calls"]] == ["Rome"]


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER], "tool_choice": "none"}])
def test_without_tools_the_text_stays(tooled: RunningServer, fields: dict[str, Any]) -> None:
    choice = ask(tooled, THINKS, **fields)
    assert choice["message"]["content"].startswith("One moment.\n<tool_call>") and "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"


def test_reasoning_can_be_left_out(tooled: RunningServer) -> None:
    message = ask(tooled, "<think>hm</think>Yes", include_reasoning=False)["message"]
    assert message == {"role": "assistant", "content": "Yes", "refusal": None}


def test_broken_calls_are_content(tooled: RunningServer) -> None:
    choice = ask(tooled, CALL.replace('"Rome"}}', '"Rome"}'), tools=[WEATHER])
    assert choice["message"]["content"] == CALL.replace('"Rome"}}', '"Rome"}') and choice["finish_reason"] == "stop"
    cut = ask(tooled, CALL, tools=[WEATHER], max_tokens=40)
    assert "tool_calls" not in cut["message"] and cut["finish_reason"] == "length"


def stream(server: RunningServer, text: str, **fields: Any) -> list[dict[str, Any]]:
    return events(server.chat(text, stream=True, **{"max_tokens": 300} | fields).text)


def test_a_stream_holds_the_same(tooled: RunningServer) -> None:
    chunks = stream(tooled, THINKS, tools=[WEATHER], n=2)
    for index in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        deltas = [c["delta"] for c in mine]
        assert "".join(d.get("content") or "" for d in deltas) == "One moment."
        assert "".join(d.get("reasoning") or "" for d in deltas) == "hm" == "".join(d.get("reasoning_content") or "" for d in deltas)
        calls: dict[int, dict[str, str]] = {}
        for part in (p for d in deltas for p in d.get("tool_calls", [])):
            call = calls.setdefault(part["index"], {"name": "", "arguments": "", "id": ""})
            call["id"] += part.get("id", "")
            call["name"] += part["function"].get("name", "")
            call["arguments"] += part["function"]["arguments"]
        assert [(c["name"], c["arguments"]) for c in calls.values()] == [("weather", '{"city": "Rome"}'), ("weather", '{"city": "Oslo"}')]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["tool_calls"]
    assert sum("tool_calls" in c["choices"][0]["delta"] for c in chunks) > 8  # arguments come as they are written
    assert all("<" not in (c["choices"][0]["delta"].get("content") or "") for c in chunks)


def test_tokens_and_logprobs_of_parts_are_kept(tooled: RunningServer) -> None:
    whole = ask(tooled, THINKS, tools=[WEATHER], logprobs=True, return_token_ids=True)
    chunks = [c["choices"][0] for c in stream(tooled, THINKS, tools=[WEATHER], logprobs=True, return_token_ids=True)]
    assert [t for c in chunks for t in c.get("token_ids", [])] == whole["token_ids"]
    assert [t for c in chunks if c["logprobs"] for t in c["logprobs"]["content"]] == whole["logprobs"]["content"]


def test_the_openai_client_reads_it(client: Any) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": THINKS}], "tools": [WEATHER]}
    fields["max_tokens"] = 300
    message = client.chat.completions.create(**fields).choices[0].message
    assert message.reasoning_content == "hm"
    assert [c.function.arguments for c in message.tool_calls] == ['{"city": "Rome"}', '{"city": "Oslo"}']
    with client.chat.completions.stream(**fields) as streamed:
        final = streamed.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls" and final.message.content == "One moment."
    assert [c.function.arguments for c in final.message.tool_calls] == ['{"city": "Rome"}', '{"city": "Oslo"}']
    # The answer goes back as it came, with the tool's result.
    history = [*fields["messages"], message.model_dump(), {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Sunny."}]
    answer = client.chat.completions.create(model="tiny", messages=history, tools=[WEATHER], max_tokens=300)
    assert answer.choices[0].message.content.endswith("Sunny.")


def prompt_of(server: RunningServer, messages: list[dict[str, Any]], **fields: Any) -> str:
    answer = server.post("/tokenize", {"messages": messages, **fields})
    assert answer.status_code == 200, answer.text
    return Tokenizer.from_bytes(byte_level_json()).decode(answer.json()["tokens"], False)


def test_history_and_tools_reach_the_template(tooled: RunningServer) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm", "refusal": None, "annotations": [], "audio": None},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "Sunny"}]},
    ]
    text = prompt_of(tooled, messages, tools=[WEATHER])
    assert text == f'[c1 weather {{"city": "Rome"}}](hm)assistantSunny{WORDS["say"]}toolc1{json.dumps(WEATHER)}'


def test_reasoning_effort_is_the_templates(tooled: RunningServer, server: RunningServer) -> None:
    assert ask(tooled, "x", reasoning_effort="low")["message"]["content"] == "x"
    assert_error(server.chat(reasoning_effort="low"), 400, param="reasoning_effort")


def test_tools_a_model_would_not_see_are_refused(server: RunningServer) -> None:
    assert_error(server.chat(tools=[WEATHER], tool_choice="none"), 400, param="tools")
    assert_error(server.chat(tools=[WEATHER]), 400, param="tools", code="no_tool_call_parser")


NAMED = {"type": "function", "function": {"name": "weather"}}
FORCED = '[{"name": "weather", "parameters": {"city": "Rome"}}, {"name": "weather", "parameters": {}}]'


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_forced_calls_are_read(tooled: RunningServer, choice: Any) -> None:
    whole = ask(tooled, FORCED, tools=[WEATHER], tool_choice=choice)
    expected = [("weather", '{"city": "Rome"}'), ("weather", "{}")]
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in whole["message"]["tool_calls"]] == expected
    assert whole["message"]["content"] is None and whole["finish_reason"] == "tool_calls"
    deltas = [c["choices"][0]["delta"] for c in stream(tooled, FORCED, tools=[WEATHER], tool_choice=choice)]
    parts = [p for d in deltas for p in d.get("tool_calls", [])]
    assert "".join(p["function"]["arguments"] for p in parts if p["index"] == 0) == '{"city": "Rome"}'
    assert not any(d.get("content") for d in deltas)
    cut = ask(tooled, FORCED, tools=[WEATHER], tool_choice=choice, max_tokens=30)
    assert "tool_calls" not in cut["message"] and FORCED.startswith(cut["message"]["content"])


def grammar(**fields: Any) -> str | None:
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [WEATHER, OTHER], **fields}
    wanted = forced_calls(parse_body(json.dumps(body).encode(), ChatCompletionRequest))
    return wanted and wanted.grammar


OTHER = {"type": "function", "function": {"name": "other", "strict": True}}


def test_grammars_of_forced_calls() -> None:
    assert grammar() is grammar(tool_choice="auto") is grammar(tool_choice="none") is None
    both = grammar(tool_choice="required")
    assert both is not None and "weather" in both and "other" in both and "*" in both.splitlines()[0]
    single = grammar(tool_choice="required", parallel_tool_calls=False)
    assert single is not None and "*" not in single.splitlines()[0]
    named = grammar(tool_choice=NAMED)
    assert named is not None and "other" not in named and "*" not in named.splitlines()[0]
    llguidance = pytest.importorskip("llguidance")
    for text in (both, single, named):
        assert llguidance.LLMatcher.validate_grammar(llguidance.LLMatcher.grammar_from_lark(text)) == ""


def test_forced_calls_that_cannot_be(tooled: RunningServer) -> None:
    other = {"type": "function", "function": {"name": "nobody"}}
    assert_error(tooled.chat(tools=[WEATHER], tool_choice=other), 400, param="tool_choice")
    deep: dict[str, Any] = {}
    for _ in range(20):
        deep = {"a": [deep]}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    assert tooled.chat(tools=[tool], tool_choice="required").status_code == 400
    large = {"type": "function", "function": {"name": "f", "parameters": {"description": "x" * 140_000}}}
    assert_error(tooled.chat(tools=[large], tool_choice="required"), 400, param="tools")
    # what the engine would say of their grammar
    assert_error(tooled.chat(WORDS["reject"], tools=[WEATHER], tool_choice="required"), 400, param="tools")


def test_marks_that_are_special_tokens_reach_the_parser() -> None:
    inner = tokenizers.Tokenizer.from_buffer(byte_level_json())
    inner.add_special_tokens(["[TOOL_CALLS]"])
    tokenizer = Tokenizer.from_bytes(inner.to_str().encode())
    ids = tokenizer.encode("Hello<|im_end|>[TOOL_CALLS]{}é")
    marks = tokenizer.special_ids(("[TOOL_CALLS]", "<tool_call>", "Hello"))
    assert list(marks.values()) == ["[TOOL_CALLS]"]
    stream = TextStream(tokenizer, shown_special=marks)
    assert "".join([*(stream.push([i]) for i in ids), stream.push([], last=True)]) == "Hello[TOOL_CALLS]{}é"


def test_a_server_without_a_format_for_tools_does_not_start() -> None:
    settings = ServerSettings(artifact="none", engine={}, enable_auto_tool_choice=True)
    with pytest.raises(ConfigError, match="--tool-call-parser"):
        reply_formats(settings, CHATML)


def test_tokenizer_info(tooled: RunningServer) -> None:
    shown = tooled.http.get("/tokenizer_info").json()
    assert shown["chat_template"] == ECHO and shown["model_max_length"] == 1024
    assert shown["added_tokens_decoder"]["1"] == {"content": "<|im_start|>", "special": True}
