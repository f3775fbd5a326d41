"""The clients people have, each against a real server process: openai (Python and Node), LangChain, LiteLLM, LlamaIndex, instructor.

LLMC_TEST_CLIENTS may name another Python that has clients installed; what it lacks too is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.running import REPLY, TOKENIZER, WORDS, RunningServer

openai = pytest.importorskip("openai", reason="the openai client is in the dev extra")
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
NUM_REPLY = len(TOKENIZER.encode(REPLY))


@pytest.fixture(scope="module")
def keyed() -> Iterator[RunningServer]:
    settings = {"api_keys": ["secret-key"], "served_model_names": ["tiny", "org/tiny-alias"]}
    with RunningServer(settings=settings, engine={"scheduling_policy": "priority"}) as running:
        yield running


@pytest.fixture(scope="module")
def client(keyed: RunningServer) -> Any:
    return openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="secret-key", max_retries=0, timeout=20)


def test_openai_models(client: Any) -> None:
    assert [m.id for m in client.models.list()] == ["tiny", "org/tiny-alias"]
    assert client.models.retrieve("org/tiny-alias").id == "org/tiny-alias"


def test_openai_chat(client: Any) -> None:
    answer = client.chat.completions.create(model="org/tiny-alias", messages=MESSAGES, n=2, seed=1, temperature=0.5, user="me")
    assert [c.message.content for c in answer.choices] == [REPLY, REPLY] and answer.model == "org/tiny-alias"
    assert answer.usage.completion_tokens == 2 * NUM_REPLY and answer.choices[0].finish_reason == "stop"
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": False, "min_tokens": 1, "priority": 2}
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=extra, max_completion_tokens=3)
    assert answer.choices[0].finish_reason == "length"


def test_openai_chat_stream(client: Any) -> None:
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == REPLY
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage.completion_tokens == NUM_REPLY
    with client.chat.completions.stream(model="tiny", messages=MESSAGES) as events:
        assert events.get_final_completion().choices[0].message.content == REPLY


def test_openai_logprobs(client: Any) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=3)
    assert "".join(t.token for t in answer.choices[0].logprobs.content) == REPLY
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, stream=True)
    assert "".join(t.token for c in stream if c.choices[0].logprobs for t in c.choices[0].logprobs.content) == REPLY


def test_openai_completions(client: Any) -> None:
    answer = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=4, logprobs=2, echo=True)
    assert [c.text[0] for c in answer.choices] == ["a", "b"] and answer.choices[0].logprobs.token_logprobs[0] is None
    text = "".join(c.choices[0].text for c in client.completions.create(model="tiny", prompt="a", max_tokens=100, stream=True, stop="how"))
    assert text == REPLY.partition("how")[0]


def test_openai_errors(client: Any, keyed: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}])
    assert bad.value.param == "tools" and "--tool-call-parser" in bad.value.message
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="wrong").models.list()
    with pytest.raises(openai.APIError, match="failed alone"):
        list(client.completions.create(model="tiny", prompt="x" + WORDS["token_error"], stream=True, max_tokens=9))


def importable(module: str, *, reason: str) -> str:
    """A Python that has the module; skips where there is none. Importing it here would cost seconds."""
    look = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    for python in filter(None, (sys.executable, os.environ.get("LLMC_TEST_CLIENTS"))):
        if subprocess.run([python, "-c", look], check=False, capture_output=True).returncode == 0:
            return python
    pytest.skip(reason)


def run_client(program: str, url: str, python: str = sys.executable) -> dict:
    """Run a client in a process of its own: their imports are heavy and patch things."""
    code = f"import json, os\nos.environ['LITELLM_LOCAL_MODEL_COST_MAP'] = 'True'\nURL = {url + '/v1'!r}\n{program}"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


LANGCHAIN = """
from langchain_openai import ChatOpenAI, OpenAI
chat = ChatOpenAI(model="tiny", base_url=URL, api_key="secret-key", max_retries=0, stream_usage=True)
answer = chat.invoke([("system", "Be brief."), ("human", "hi")])
pieces = list(chat.stream("hi"))
batch = chat.batch(["a", "b"], stop=["how"])
plain = OpenAI(model="tiny", base_url=URL, api_key="secret-key", max_retries=0, max_tokens=100).invoke("hi")
print(json.dumps({"invoke": answer.content, "usage": answer.usage_metadata["output_tokens"], "stream": "".join(p.content for p in pieces),
                  "batch": [b.content for b in batch], "plain": plain}))
"""

LITELLM = """
import litellm
fields = {"model": "openai/tiny", "api_base": URL, "api_key": "secret-key", "num_retries": 0}
messages = [{"role": "user", "content": "hi"}]
answer = litellm.completion(messages=messages, temperature=0.2, max_tokens=100, **fields)
pieces = list(litellm.completion(messages=messages, stream=True, **fields))
text = litellm.text_completion(prompt="hi", max_tokens=100, **(fields | {"model": "text-completion-openai/tiny"}))
try:
    litellm.completion(messages=messages, top_logprobs=3, **fields)
    refused = ""
except litellm.BadRequestError as error:
    refused = str(error)
print(json.dumps({"invoke": answer.choices[0].message.content, "usage": answer.usage.completion_tokens, "refused": refused,
                  "stream": "".join(p.choices[0].delta.content or "" for p in pieces), "plain": text.choices[0].text}))
"""


def test_langchain(keyed: RunningServer) -> None:
    python = importable("langchain_openai", reason="langchain-openai is in the dev extra")
    result = run_client(LANGCHAIN, keyed.url, python)
    before_stop = REPLY.partition("how")[0]
    assert result == {"invoke": REPLY, "usage": NUM_REPLY, "stream": REPLY, "batch": [before_stop] * 2, "plain": REPLY}


def test_litellm(keyed: RunningServer) -> None:
    python = importable("litellm", reason="litellm is in the dev extra")
    result = run_client(LITELLM, keyed.url, python)
    assert "top_logprobs needs logprobs" in result.pop("refused")
    assert result == {"invoke": REPLY, "usage": NUM_REPLY, "stream": REPLY, "plain": REPLY}


LLAMA_INDEX = """
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
llm = OpenAILike(model="tiny", api_base=URL, api_key="secret-key", max_retries=0, is_chat_model=True, context_window=512, max_tokens=100)
messages = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="hi")]
pieces = list(llm.stream_chat(messages))
plain = OpenAILike(model="tiny", api_base=URL, api_key="secret-key", max_retries=0, is_chat_model=False, max_tokens=100).complete("hi")
print(json.dumps({"invoke": llm.chat(messages).message.content, "stream": "".join(p.delta or "" for p in pieces), "plain": plain.text}))
"""


@pytest.mark.slow
def test_llama_index(keyed: RunningServer) -> None:
    python = importable("llama_index.llms", reason="llama-index-llms-openai-like is not installed")
    assert run_client(LLAMA_INDEX, keyed.url, python) == {"invoke": REPLY, "stream": REPLY, "plain": REPLY}


INSTRUCTOR = """
import instructor, openai
from pydantic import BaseModel
class City(BaseModel):
    city: str
def ask(mode, text):
    client = instructor.from_openai(openai.OpenAI(base_url=URL, api_key="x", max_retries=0), mode=mode)
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="tiny", response_model=City, messages=messages, max_retries=0).city
print(json.dumps([ask(instructor.Mode.JSON_SCHEMA, '{"city": "Rome"}'), ask(instructor.Mode.JSON, '{"city": "Oslo"}'),
                  ask(instructor.Mode.TOOLS, '[{"name": "City", "parameters": {"city": "Bern"}}]')]))
"""


@pytest.mark.slow
def test_instructor() -> None:
    """The model says what it is told to; instructor reads it as an answer to a schema, and as a call that it forces."""
    python = importable("instructor", reason="instructor is not installed")
    template = "{{ messages[-1].content }}" + WORDS["say"] + "{{ (tools or []) | length }}{# <tool_call> </tool_call> arguments #}"
    with RunningServer(settings={"chat_template": template}, engine={"max_model_len": 2048, "step_ms": 0}) as running:
        assert run_client(INSTRUCTOR, running.url, python) == ["Rome", "Oslo", "Bern"]


NODE = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "secret-key", maxRetries: 0 });
const messages = [{ role: "system", content: "Be brief." }, { role: "user", content: "hi" }];
const whole = await client.chat.completions.create({ model: "tiny", messages, n: 2, seed: 1 });
let streamed = "", usage = 0;
const streaming = { model: "tiny", messages, stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create(streaming)) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage?.completion_tokens ?? usage;
}
const plain = await client.completions.create({ model: "tiny", prompt: "hi", max_tokens: 100 });
const response = await client.responses.create({ model: "tiny", input: "hi" });
let refused = "";
try { await client.chat.completions.create({ model: "nobody", messages }); } catch (error) { refused = `${error.status} ${error.code}`; }
const models = []; for await (const model of client.models.list()) models.push(model.id);
console.log(JSON.stringify({ whole: whole.choices.map((c) => c.message.content), streamed, usage, plain: plain.choices[0].text,
  response: response.output_text, refused, models }));
"""


@pytest.mark.slow
def test_openai_for_node(keyed: RunningServer, tmp_path: Path) -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no node and npm here")
    install = ["npm", "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(tmp_path), "openai"]
    if subprocess.run(install, capture_output=True, timeout=180, check=False).returncode != 0:
        pytest.skip("npm cannot fetch the openai package here")
    (tmp_path / "client.mjs").write_text(NODE)
    command = ["node", str(tmp_path / "client.mjs"), keyed.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {
        "whole": [REPLY, REPLY],
        "streamed": REPLY,
        "usage": NUM_REPLY,
        "plain": REPLY,
        "response": REPLY,
        "refused": "404 model_not_found",
        "models": ["tiny", "org/tiny-alias"],
    }
