"""Fields beyond OpenAI's own: what vLLM's clients send, and what comes back."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from llmc.errors import RequestRejected
from llmc.runtime.server.chat_prompt import _rendered, allowed_variables, cut_at_final_message
from llmc.runtime.server.front import cache_salt_of
from llmc.runtime.server.sampling import bad_word_ids
from llmc.runtime.server.schemas import ChatCompletionRequest, CompletionRequest
from llmc.runtime.text import ChatTemplate
from tests.server.running import REPLY, TOKENIZER, RunningServer, assert_error
from tests.server.test_api import events
from tests.server.test_chat_template import MACRO_LIKE, TOKENS, TOOLS_LIKE

REPLY_IDS = TOKENIZER.encode(REPLY)
CHAT_PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_token_ids_of_chat(server: RunningServer) -> None:
    body = server.chat(return_token_ids=True, n=2).json()
    assert body["prompt_token_ids"] == TOKENIZER.encode(CHAT_PROMPT)
    assert [c["token_ids"] for c in body["choices"]] == [REPLY_IDS] * 2
    chunks = events(server.chat(return_token_ids=True, stream=True).text)
    assert chunks[0]["prompt_token_ids"] == body["prompt_token_ids"] and "prompt_token_ids" not in chunks[1]
    assert [t for c in chunks for t in c["choices"][0].get("token_ids", [])] == REPLY_IDS
    assert "token_ids" not in server.chat().text


def test_token_ids_of_completions(server: RunningServer) -> None:
    (choice,) = server.complete([105, 106], return_token_ids=True, max_tokens=3).json()["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([105, 106], REPLY_IDS[:3])
    chunks = events(server.complete([105, 106], return_token_ids=True, max_tokens=3, stream=True).text)
    assert chunks[0]["choices"][0]["prompt_token_ids"] == [105, 106]
    assert [t for c in chunks for t in c["choices"][0]["token_ids"]] == REPLY_IDS[:3]


def test_tokens_named_by_id(server: RunningServer) -> None:
    names = [f"token_id:{i}" for i in REPLY_IDS[:3]]
    (choice,) = server.chat(logprobs=True, top_logprobs=1, max_tokens=3, return_tokens_as_token_ids=True).json()["choices"]
    content = choice["logprobs"]["content"]
    assert [t["token"] for t in content] == names and all(t["top_logprobs"][0]["token"].startswith("token_id:") for t in content)
    (choice,) = server.complete("x", logprobs=1, max_tokens=3, return_tokens_as_token_ids=True).json()["choices"]
    assert choice["logprobs"]["tokens"] == names and names[0] in choice["logprobs"]["top_logprobs"][0]
    assert choice["logprobs"]["text_offset"][2] == len(TOKENIZER.decode(REPLY_IDS[:2]))


@pytest.mark.parametrize("chat", [True, False])
def test_usage_in_every_chunk(server: RunningServer, chat: bool) -> None:
    fields = {"stream": True, "max_tokens": 5, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    chunks = events((server.chat(**fields) if chat else server.complete(**fields)).text)
    counts = [c["usage"]["completion_tokens"] for c in chunks if c["choices"] and c["usage"]]
    assert counts == sorted(counts) and counts[-1] == 5 == chunks[-1]["usage"]["completion_tokens"]
    wrong = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    assert_error(server.chat(**wrong), 400, param="stream_options")


@pytest.mark.parametrize("chat", [True, False])
def test_metrics_of_one_request(server: RunningServer, chat: bool) -> None:
    call = server.chat if chat else server.complete
    shown = call(return_metrics=True, max_tokens=4).json()["metrics"]
    assert 0 < shown["time_to_first_token_ms"] <= shown["end_to_end_ms"] and shown["output_tokens_per_second"] > 0
    last = events(call(return_metrics=True, max_tokens=4, stream=True).text)[-1]
    assert last["choices"] == [] and last["metrics"]["end_to_end_ms"] > 0 and "usage" not in last
    assert "metrics" not in call(max_tokens=4).json()


def test_truncated_prompts(server: RunningServer) -> None:
    long = list(range(50, 90))
    body = server.complete(long, truncate_prompt_tokens=3, return_token_ids=True, max_tokens=1).json()
    assert body["choices"][0]["prompt_token_ids"] == long[-3:] and body["usage"]["prompt_tokens"] == 3
    body = server.complete([60] * 1000, truncate_prompt_tokens=-1, max_tokens=12).json()
    assert body["usage"]["prompt_tokens"] == 500
    assert server.chat("x" * 5000, truncate_prompt_tokens=-1, max_tokens=1).json()["usage"]["prompt_tokens"] == 511
    assert_error(server.complete(long, truncate_prompt_tokens=0), 400, param="truncate_prompt_tokens")
    assert_error(server.complete(long, truncate_prompt_tokens=-2), 400, param="truncate_prompt_tokens")


def test_the_final_message_is_continued(server: RunningServer) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
    fields: dict[str, Any] = {"messages": messages, "continue_final_message": True}
    tokens = server.post("/tokenize", fields).json()["tokens"]
    assert TOKENIZER.decode(tokens, False) == CHAT_PROMPT + "Well, "
    assert server.post("/v1/chat/completions", fields).json()["usage"]["prompt_tokens"] == len(tokens)
    both = fields | {"add_generation_prompt": True}
    assert_error(server.post("/v1/chat/completions", both), 400, param="continue_final_message")
    empty = fields | {"messages": [{"role": "user", "content": " "}]}
    assert_error(server.post("/v1/chat/completions", empty), 400, param="continue_final_message")


def test_templates_that_take_arguments_as_text() -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}]}
    for source in ("{{ f.arguments | tojson }}", "{{ '<' + f.arguments }}"):
        template = ChatTemplate("{% for m in messages %}{% set f = m.tool_calls[0].function %}" + source + "{% endfor %}", {})
        assert _rendered(template, [message], True, {}).removeprefix("<") == '{"a": "é"}'
    with pytest.raises(RequestRejected, match="too few"):
        _rendered(ChatTemplate("{{ raise_exception('too few') }}", {}), [message], True, {})


def test_where_the_final_message_is_cut() -> None:
    assert cut_at_final_message("<a> x  y \n</a>", " x  y \n") == "<a> x  y \n"
    assert cut_at_final_message("<a>x</a>", "  x \n ") == "<a>x"  # a template that trims
    with pytest.raises(RequestRejected):
        cut_at_final_message("<a>other</a>", "x")


def test_template_variables_are_an_allow_list(server: RunningServer) -> None:
    assert ChatTemplate(TOOLS_LIKE, TOKENS).variables == {"enable_thinking", "content"}
    assert ChatTemplate(MACRO_LIKE, TOKENS).variables == {"date_string", "unknown"}
    template = ChatTemplate(TOOLS_LIKE, TOKENS)
    assert allowed_variables(template, {"enable_thinking": False, "content": None}) == {"enable_thinking": False}
    for name in ("messages", "tools", "add_generation_prompt", "bos_token", "raise_exception", "namespace", "chat_template", "other"):
        with pytest.raises(RequestRejected) as caught:
            allowed_variables(template, {name: "x"})
        assert caught.value.param == "chat_template_kwargs"
    assert_error(server.chat(chat_template_kwargs={"messages": "x"}), 400, param="chat_template_kwargs")
    assert server.chat(chat_template_kwargs={}).status_code == 200


def test_cache_salts_stay_within_their_key() -> None:
    def request(tenant: str) -> Any:
        return SimpleNamespace(scope={"llmc.tenant": tenant})

    salts = [cache_salt_of(request(t), own) for t in ("", "a1", "b2") for own in (None, "a1", "b2", "/b2")]
    assert len(set(salts)) == len(salts)


@pytest.mark.parametrize("value", ["", "x" * 1025, 1])
def test_bad_cache_salts(server: RunningServer, value: Any) -> None:
    assert_error(server.complete("x", cache_salt=value), 400, param="cache_salt")


async def _bad_words(words: list[str]) -> list[list[int]]:
    class Front:
        async def encode(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
            return [TOKENIZER.encode(text, add_special_tokens) for text in texts]

    return await bad_word_ids(Front(), CompletionRequest(prompt="x", bad_words=words))  # type: ignore[arg-type]


def test_bad_words_as_tokens() -> None:
    import asyncio

    found = asyncio.run(_bad_words(["world", "fox"]))
    assert TOKENIZER.encode("world") in found and all(TOKENIZER.decode(ids).strip() in ("world", "fox") for ids in found)
    with pytest.raises(RequestRejected, match="bad_words"):
        asyncio.run(_bad_words(["  "]))


def test_allowed_tokens_are_checked(server: RunningServer) -> None:
    assert server.complete("x", allowed_token_ids=[1, 2], bad_words=["world"]).status_code == 200
    assert_error(server.complete("x", allowed_token_ids=[400]), 400, param="allowed_token_ids")
    assert_error(server.complete("x", allowed_token_ids=[]), 400, param="allowed_token_ids")
    assert_error(server.complete("x", bad_words=["a"] * 257), 400, param="bad_words")


def test_log_probabilities_of_the_whole_vocabulary(server: RunningServer) -> None:
    fields: dict[str, Any] = {"max_tokens": 2, "echo": True, "logprobs": -1, "return_tokens_as_token_ids": True}
    assert "--max-logprobs" in assert_error(server.complete("x", **fields), 400, param="logprobs")
    assert_error(server.complete("x", prompt_logprobs=-1), 400, param="prompt_logprobs")
    with RunningServer(settings={"max_logprobs": -1}) as generous:
        (choice,) = generous.complete("hi", **fields, prompt_logprobs=2).json()["choices"]
        assert {len(one) for one in choice["logprobs"]["top_logprobs"] if one} == {300}  # as many as the fake engine has
        assert {len(one) for one in choice["prompt_logprobs"] if one} == {2}
        assert len(generous.complete("hi", prompt_logprobs=-1).json()["choices"][0]["prompt_logprobs"][1]) == 300
        (chosen, _) = generous.chat(logprobs=True, top_logprobs=-1, max_tokens=2).json()["choices"][0]["logprobs"]["content"]
        assert len(chosen["top_logprobs"]) == 400


def test_a_priority_that_would_not_act_is_refused(server: RunningServer) -> None:
    assert server.complete("x", priority=0).status_code == 200
    for refused in (
        server.complete("x", priority=1),
        server.chat("x", priority=-1),
        server.post("/v1/responses", {"input": "x", "priority": 1}),
    ):
        assert "--scheduling-policy" in assert_error(refused, 400, param="priority")
    with RunningServer(engine={"scheduling_policy": "priority"}) as ranked:
        assert ranked.complete("x", priority=1).status_code == 200


def test_best_of_is_refused_with_the_reason(server: RunningServer) -> None:
    assert "use n" in assert_error(server.complete("x", best_of=3), 400, param="best_of")


def test_nulls_mean_absent_at_every_depth(server: RunningServer) -> None:
    message = {"role": "user", "content": "hi", "name": None, "tool_calls": None, "function_call": None, "audio": None}
    fields = {name: None for name in ChatCompletionRequest.model_fields if name not in ("messages", "stream_options", "stream")}
    body = {"messages": [message], "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": None}}
    answer = server.post("/v1/chat/completions", fields | body)
    assert answer.status_code == 200, answer.text
    assert json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))["usage"]["prompt_tokens"] > 0
    assert_error(server.post("/v1/chat/completions", {"messages": [message | {"made_up": None}]}), 400, param="messages")
