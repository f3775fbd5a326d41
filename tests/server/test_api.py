"""What the endpoints answer, in shape and value."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.server.running import REPLY, TOKENIZER, WORDS, RunningServer, assert_error


def events(text: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_chat_answer(server: RunningServer) -> None:
    body = server.chat("Hello", max_tokens=None).json()
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-") and body["model"] == "tiny"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": REPLY, "refusal": None}
    assert choice["finish_reason"] == "stop"
    prompt = TOKENIZER.encode("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    reply = TOKENIZER.encode(REPLY)
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": len(reply),
        "total_tokens": len(prompt) + len(reply),
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_chat_stream_is_the_same_answer(server: RunningServer) -> None:
    answer = server.chat(stream=True, n=2, stream_options={"include_usage": True}, max_completion_tokens=5)
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = events(answer.text)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    texts = {0: "", 1: ""}
    ends = {}
    for chunk in chunks[:-1]:
        assert chunk["usage"] is None
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        if choice["finish_reason"]:
            ends[choice["index"]] = choice["finish_reason"]
    assert texts == dict.fromkeys((0, 1), TOKENIZER.decode(TOKENIZER.encode(REPLY)[:5]))
    assert ends == {0: "length", 1: "length"}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 10


def test_completion_forms_of_prompt(server: RunningServer) -> None:
    one = server.complete("Hello").json()["choices"]
    assert [c["text"] for c in one] == [TOKENIZER.decode(TOKENIZER.encode(REPLY)[:16])]
    for prompt, count in [(["a", "b", "c"], 3), ([105, 106, 107], 1), ([[105, 106], [107]], 2)]:
        choices = server.complete(prompt, n=2, max_tokens=2).json()["choices"]
        assert [c["index"] for c in choices] == list(range(2 * count))


def test_stop_strings_cut_and_are_never_shown(server: RunningServer) -> None:
    fields = {"stop": ["wor", "zzz"], "max_tokens": 100}
    (choice,) = server.complete("x", **fields).json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("Hello ", "stop", "wor")
    (choice,) = server.complete("x", **fields, include_stop_str_in_output=True).json()["choices"]
    assert choice["text"] == "Hello wor"
    chunks = events(server.complete("x", **fields, stream=True).text)
    assert "".join(c["choices"][0]["text"] for c in chunks) == "Hello "
    server.wait_for_load(0, 0)


def test_stop_token_text_is_shown_only_if_asked(server: RunningServer) -> None:
    reply = TOKENIZER.encode(REPLY)
    (choice,) = server.complete("x", stop_token_ids=[reply[2]]).json()["choices"]
    assert (choice["text"], choice["stop_reason"]) == (TOKENIZER.decode(reply[:2]), reply[2])
    (choice,) = server.complete("x", stop_token_ids=[reply[2]], include_stop_str_in_output=True).json()["choices"]
    assert choice["text"] == TOKENIZER.decode(reply[:3])


def test_logprobs_of_chat(server: RunningServer) -> None:
    (choice,) = server.chat(logprobs=True, top_logprobs=2, max_tokens=3).json()["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(t["token"] for t in content) == choice["message"]["content"]
    assert all(len(t["top_logprobs"]) == 2 and bytes(t["bytes"]).decode() == t["token"] and t["logprob"] == -0.25 for t in content)


def test_logprobs_and_echo_of_completions(server: RunningServer) -> None:
    prompt = TOKENIZER.encode("hello world")
    (choice,) = server.complete("hello world", echo=True, logprobs=1, max_tokens=2).json()["choices"]
    shown = choice["logprobs"]
    assert choice["text"].startswith("hello world") and "".join(shown["tokens"]) == choice["text"]
    assert shown["token_logprobs"][0] is None and len(shown["token_logprobs"]) == len(prompt) + 2
    assert [choice["text"][o:][: len(t)] for o, t in zip(shown["text_offset"], shown["tokens"], strict=True)] == shown["tokens"]
    (scored,) = server.complete("hello world", echo=True, logprobs=1, max_tokens=0).json()["choices"]
    assert scored["text"] == "hello world" and len(scored["logprobs"]["tokens"]) == len(prompt)
    streamed = events(server.complete("hello world", echo=True, logprobs=1, max_tokens=2, stream=True).text)
    assert "".join(c["choices"][0]["text"] for c in streamed) == choice["text"]
    assert [t for c in streamed for t in (c["choices"][0]["logprobs"] or {"tokens": []})["tokens"]] == shown["tokens"]
    for sample in (0, 1):
        of_two = events(server.complete("hello world", echo=True, logprobs=1, max_tokens=2, n=2, stream=True).text)
        mine = [c["choices"][0]["logprobs"] for c in of_two if c["choices"][0]["index"] == sample]
        assert [v for one in mine if one for v in one["token_logprobs"]] == shown["token_logprobs"]


def test_prompt_logprobs(server: RunningServer) -> None:
    answer = server.complete([105, 106], prompt_logprobs=1, max_tokens=1).json()
    first, second = answer["choices"][0]["prompt_logprobs"]
    assert first is None and second["106"] == {"logprob": -0.25, "rank": 1, "decoded_token": TOKENIZER.token_text(106)}


@pytest.mark.parametrize(("top", "of_prompt"), [(1, 3), (3, 1), (0, 2)])
def test_prompt_logprobs_beside_an_echo(server: RunningServer, top: int, of_prompt: int) -> None:
    """Each has as many as it asked for, with several samples too."""
    fields = {"max_tokens": 1, "n": 2, "return_tokens_as_token_ids": True}  # several tokens may have one text
    answer = server.complete([105, 106], echo=True, logprobs=top, prompt_logprobs=of_prompt, **fields).json()
    for choice in answer["choices"]:
        assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"][1]) == of_prompt
        assert [len(one) for one in choice["logprobs"]["top_logprobs"][1:]] == [max(top, 1)] * 2  # the token itself always


def test_half_characters_are_never_streamed(server: RunningServer) -> None:
    prompt = TOKENIZER.encode("🎈鱼" + WORDS["parrot"])
    assert len(prompt) > 5
    chunks = events(server.complete(prompt, stream=True, max_tokens=len(prompt)).text)
    texts = [c["choices"][0]["text"] for c in chunks]
    assert "".join(texts) == "🎈鱼" + WORDS["parrot"] and not any("\ufffd" in t for t in texts)


def test_tokenize_and_back(server: RunningServer) -> None:
    body = server.post("/tokenize", {"prompt": "hello 😀", "return_token_strs": True}).json()
    assert body["tokens"] == TOKENIZER.encode("hello 😀") and body["count"] == len(body["tokens"]) and body["max_model_len"] == 512
    assert len(body["token_strs"]) == body["count"]
    assert server.post("/detokenize", {"tokens": body["tokens"]}).json() == {"prompt": "hello 😀"}
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}).json()
    assert TOKENIZER.decode(chat["tokens"], False) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_tokenizer_info_is_shown_only_if_switched_on(server: RunningServer) -> None:
    assert_error(server.http.get("/tokenizer_info"), 404)


def test_models_version_load_health(server: RunningServer) -> None:
    (card,) = server.http.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 512)
    assert server.http.get("/v1/models/tiny").json()["id"] == "tiny"
    assert_error(server.http.get("/v1/models/other/name"), 404, code="model_not_found")
    assert server.http.get("/version").json()["version"]
    assert server.http.get("/load").json()["state"] == "ready"
    assert [server.http.get(f"/health{p}").status_code for p in ("", "/live", "/ready")] == [200, 200, 200]


def test_metrics_count_and_have_bounded_labels(server: RunningServer) -> None:
    server.chat("x" * 50)
    server.http.get("/made/up/path/" + "z" * 50)
    text = server.http.get("/metrics").text
    for name in ("num_requests_running", "kv_cache_usage_perc", "prompt_tokens_total", "time_to_first_token_seconds_bucket"):
        assert f"llmc:{name}" in text
    assert 'llmc:request_success_total{finished_reason="stop",model_name="tiny"}' in text
    assert 'handler="unknown",status="404"' in text and "zzzz" not in text and "xxxx" not in text


def test_metrics_of_a_requests_stages_add_up(server: RunningServer) -> None:
    server.complete("hi", n=3, max_tokens=5)
    found = dict(re.findall(r'^llmc:(\w+_(?:sum|count)){model_name="tiny"} (\S+)', server.http.get("/metrics").text, re.MULTILINE))
    stages = {name: float(found[f"request_{name}_time_seconds_sum"]) for name in ("queue", "prefill", "decode", "inference")}
    assert stages["inference"] == pytest.approx(stages["prefill"] + stages["decode"]) and min(stages.values()) > 0
    assert stages["queue"] + stages["inference"] <= float(found["e2e_request_latency_seconds_sum"])
    assert len({found[f"request_{name}_time_seconds_count"] for name in stages} | {found["e2e_request_latency_seconds_count"]}) == 1
    assert 1 <= float(found["request_max_num_generation_tokens_count"]) < float(found["e2e_request_latency_seconds_count"])
    assert 'llmc:cache_config_info{block_size="16",num_gpu_blocks="64"} 1.0' in server.http.get("/metrics").text


def test_request_ids(server: RunningServer) -> None:
    assert server.http.get("/version", headers={"X-Request-Id": "my:id-1._A"}).headers["x-request-id"] == "my:id-1._A"
    for bad in ("a b", "x" * 129, 'a"b', "é".encode()):
        ours = server.http.get("/version", headers=[(b"x-request-id", bad if isinstance(bad, bytes) else bad.encode())])
        assert len(ours.headers["x-request-id"]) == 32


def test_openapi_describes_bodies(server: RunningServer) -> None:
    document = server.http.get("/openapi.json").json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatCompletionRequest"}
    assert document["components"]["schemas"]["ChatCompletionRequest"]["additionalProperties"] is False


@pytest.mark.parametrize("word", ["reject", "bug", "token_error"])
def test_one_bad_request_fails_alone(server: RunningServer, word: str) -> None:
    status = 400 if word == "reject" else 500
    message = assert_error(server.complete(["fine", "bad " + WORDS[word]], max_tokens=8), status)
    assert "secret" not in message
    server.wait_for_load(0, 0)


def test_an_error_in_a_stream_is_an_event(server: RunningServer) -> None:
    text = server.complete("bad " + WORDS["token_error"], stream=True, max_tokens=8).text
    *_, last = events(text)
    assert last["error"]["message"] == "this sequence failed alone" and last["error"]["type"] == "server_error"
    assert last["error"]["param"] == "prompt"
    assert_error(server.complete("bad " + WORDS["reject"], stream=True), 400, param="prompt")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "field", "given"),
    [
        ("/v1/completions", "prompt", "{}"),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": "{}"}]),
        ("/v1/responses", "input", "{}"),
        ("/v1/messages", "messages", [{"role": "user", "content": "{}"}]),
    ],
)
def test_what_the_engine_refuses_names_the_clients_field(server: RunningServer, path: str, field: str, given: Any, stream: bool) -> None:
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"

    def error_of(text: str, max_tokens: int = 9) -> dict[str, Any]:
        filled = json.loads(json.dumps(given).replace("{}", text))
        answer = server.post(path, {"model": "tiny", field: filled, "stream": stream, limit: max_tokens})
        assert answer.status_code in (200, 400, 500)
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")] or [answer.text]
        return next(json.loads(line)["error"] for line in lines if '"error":{' in line)

    assert (error_of("bad " + WORDS["reject"])["param"], error_of("bad " + WORDS["token_error"])["param"]) == (field, field)
    long = error_of("x", 600)
    assert (long["param"], long["code"]) == (limit, "context_length_exceeded")
    assert error_of("a b " * 300)["param"] == field
