"""Structured output over HTTP: the demo model, `llmc serve`, the openai client."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel

from tests.end_to_end.conftest import workshop  # noqa: F401
from tests.server.running import assert_error, children

MESSAGES: Any = [{"role": "user", "content": "Describe a person."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "address": {"$ref": "#/$defs/address"},
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
    "$defs": {
        "address": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
    },
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
OCTOPUS = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "octopus"}}}
LARGE = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": "x" * 140_000}}}


@pytest.fixture(scope="module")
def artifact(workshop: Any) -> Path:  # noqa: F811
    import torch

    return workshop.artifact("demo", dtype=torch.bfloat16)


class Served:
    """A running `llmc serve`."""

    def __init__(self, artifact: Path, log: Path) -> None:
        command = [sys.executable, "-m", "llmc", "serve", str(artifact), "--port", "0", "--max-num-batched-tokens", "256"]
        with log.open("wb") as stream:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stream, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"ready at (\S+)", line)
        assert found, log.read_text()
        self.url = found[1]
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.openai = OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=60)

    @property
    def workers(self) -> list[int]:
        """The grammar workers' process ids."""
        (engine,) = children(self.process.pid)
        return children(engine)

    def chat(self, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 150, **fields})


@pytest.fixture(scope="module")
def served(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(artifact, tmp_path_factory.mktemp("log") / "log")
    yield served
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(30) == 0


def content(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "stop", choice
    return choice["message"]["content"]


def test_no_worker_before_the_first_structured_request(served: Served) -> None:
    assert served.chat(max_tokens=5).status_code == 200
    assert served.workers == []
    assert json.loads(content(served.chat(response_format={"type": "json_object"}))) is not None
    assert len(served.workers) == 2


@pytest.mark.parametrize("temperature", [0, 1])
def test_response_formats(served: Served, temperature: float) -> None:
    for seed in range(3):
        jsonschema.validate(json.loads(content(served.chat(response_format=FORMAT, temperature=temperature, seed=seed))), SCHEMA)
        assert isinstance(
            json.loads(content(served.chat(response_format={"type": "json_object"}, temperature=temperature, seed=seed))), dict
        )


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": r"[A-Z][a-z]{2,8}, \d{4}"}, r"[A-Z][a-z]{2,8}, \d{4}"),
        ({"choice": ["positive", "negative"]}, "positive|negative"),
        ({"grammar": 'root ::= "SELECT " col ("," col)* " FROM t"\ncol ::= [a-z]+'}, r"SELECT [a-z]+(,[a-z]+)* FROM t"),
        ({"grammar": 'start: "<" NUMBER ">"\nNUMBER: /[0-9]{1,5}/'}, r"<[0-9]{1,5}>"),
        ({"json": {"enum": ["x", "y"]}}, '"x"|"y"'),
        ({"json": '{"const": 7}'}, "7"),
    ],
)
def test_structured_outputs_as_vllm_has_them(served: Served, wanted: dict[str, Any], pattern: str) -> None:
    assert re.fullmatch(pattern, content(served.chat(structured_outputs=wanted, temperature=1.0)))
    answer = served.http.post("/v1/completions", json={"prompt": ["It", "is"], "structured_outputs": wanted, "n": 2, "max_tokens": 60})
    assert answer.status_code == 200, answer.text
    for choice in answer.json()["choices"]:
        assert choice["finish_reason"] == "stop" and re.fullmatch(pattern, choice["text"]), choice


class Person(BaseModel):
    name: str
    age: int
    friends: list[str]


def test_the_openai_client_parses_into_a_model(served: Served) -> None:
    answer = served.openai.chat.completions.parse(model="demo_model", messages=MESSAGES, response_format=Person, max_tokens=200, seed=4)
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_a_stream_is_the_same_document(served: Served) -> None:
    fields: Any = {"model": "demo_model", "messages": MESSAGES, "response_format": FORMAT, "max_tokens": 120, "seed": 11}
    pieces = [chunk.choices[0] for chunk in served.openai.chat.completions.create(stream=True, **fields)]
    text = "".join(piece.delta.content or "" for piece in pieces)
    assert text == served.openai.chat.completions.create(**fields).choices[0].message.content
    assert pieces[-1].finish_reason == "stop" and len(pieces) > 5
    jsonschema.validate(json.loads(text), SCHEMA)


def test_seeded_documents_are_the_same_in_a_crowd(served: Served) -> None:
    def ask(number: int) -> str:
        seed = number % 6
        if number % 2:
            return content(served.chat(structured_outputs={"regex": "[a-z ]{30,60}"}, seed=seed, max_tokens=100))
        return content(served.chat(response_format=FORMAT, seed=seed, max_tokens=100))

    alone = [ask(number) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == alone


def test_too_little_room_ends_with_length(served: Served) -> None:
    choice = served.chat(response_format=FORMAT, max_tokens=4).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"].startswith("{")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "problem", "param"),
    [
        ({"structured_outputs": {"regex": "(a"}}, "regex parse error: unclosed group", "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "unknown name", "structured_outputs"),
        ({"structured_outputs": {"json": {"$ref": "http://127.0.0.1:9/x"}}}, "127.0.0.1", "structured_outputs"),
        ({"response_format": OCTOPUS}, "structured output", "response_format"),
        ({"response_format": LARGE}, "larger", "response_format"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "send one", "response_format"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "ignore_eos"),
        ({"structured_outputs": {"regex": "(" * 100}}, "deeper", "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "exactly one", "structured_outputs"),
        ({"guided_regex": "a"}, "structured_outputs", "guided_regex"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_the_stream(
    served: Served, fields: dict[str, Any], problem: str, param: str, stream: bool
) -> None:
    answer = served.chat(stream=stream, **fields)
    assert_error(answer, 400, param=param)
    assert problem in answer.json()["error"]["message"] and len(answer.content) < 1000


def test_the_openai_client_sees_a_bad_request(served: Served) -> None:
    with pytest.raises(BadRequestError, match="not"):
        bad: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {"type": "string"}}}}
        served.openai.chat.completions.create(model="demo_model", messages=MESSAGES, response_format=bad)


def test_killed_workers_cost_nobody_an_answer(served: Served) -> None:
    def ask(seed: int) -> str:
        return content(served.chat(structured_outputs={"regex": "[a-z]{200,220}"}, seed=seed, max_tokens=400))

    expected = [ask(seed) for seed in range(3)]
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, seed) for seed in range(3)]
        time.sleep(0.1)
        for pid in served.workers:
            os.kill(pid, signal.SIGKILL)
        assert [answer.result() for answer in asked] == expected
    assert served.http.get("/health").status_code == 200
    assert len(children(served.process.pid)) == 1


def test_a_bomb_leaves_the_server_answering(served: Served) -> None:
    with ThreadPoolExecutor(1) as pool:
        bomb = pool.submit(served.chat, structured_outputs={"json": {"type": "integer", "multipleOf": 999983}})
        time.sleep(0.5)
        assert served.chat(max_tokens=5).status_code == 200
        answer = bomb.result()
    assert_error(answer, 400)
    assert "longer than" in answer.json()["error"]["message"]
    jsonschema.validate(json.loads(content(served.chat(response_format=FORMAT))), SCHEMA)
