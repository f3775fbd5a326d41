"""POST /v1/embeddings, /v1/score, /v1/rerank over the fake engine, whose vectors count a prompt's ids 70 to 76 and its tokens."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from llmc.runtime.server.schemas_embeddings import EmbeddingsRequest, RerankRequest, ScoreRequest
from tests.server.running import TOKENIZER, TRIGGERS, WORDS, RunningServer, assert_error
from tests.server.test_hostile import NASTY
from tests.server.test_schemas import walk

EMBEDDINGS, SCORE, RERANK = "/v1/embeddings", "/v1/score", "/v1/rerank"


@pytest.fixture(scope="module")
def embedder() -> Iterator[RunningServer]:
    with RunningServer(settings={"max_sequences_per_request": 4}, engine={"embeds": True, "step_ms": 0}) as running:
        yield running


def vector(ids: list[int]) -> list[float]:
    return [float(ids.count(token)) for token in range(70, 77)] + [float(len(ids))]


def cosine(first: list[float], second: list[float]) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True)) / math.hypot(*first) / math.hypot(*second)


def test_forms_of_input(embedder: RunningServer) -> None:
    body = embedder.post(EMBEDDINGS, {"input": [70, 70, 72]}).json()
    assert body["object"] == "list" and body["model"] == "tiny"
    assert body["data"] == [{"object": "embedding", "index": 0, "embedding": vector([70, 70, 72])}]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    lists = embedder.post(EMBEDDINGS, {"input": [[70], [71, 71]]}).json()
    assert [item["embedding"] for item in lists["data"]] == [vector([70]), vector([71, 71])]
    texts = embedder.post(EMBEDDINGS, {"input": ["a b", "c"], "encoding_format": "base64"}).json()
    found = [list(struct.unpack("<8f", base64.b64decode(item["embedding"]))) for item in texts["data"]]
    assert found == [vector(TOKENIZER.encode(text)) for text in ("a b", "c")]
    assert embedder.post(EMBEDDINGS, {"input": "a b"}).json()["data"][0]["embedding"] == found[0]


def test_more_inputs_than_run_at_once_keep_their_order(embedder: RunningServer) -> None:
    inputs = [[70] * (1 + index % 7) for index in range(23)]
    body = embedder.post(EMBEDDINGS, {"input": inputs}).json()
    assert [item["embedding"] for item in body["data"]] == [vector(ids) for ids in inputs]
    assert body["usage"]["prompt_tokens"] == sum(map(len, inputs))
    embedder.wait_for_load(0, 0)


def test_truncation_keeps_the_front(embedder: RunningServer) -> None:
    assert embedder.post(EMBEDDINGS, {"input": [70, 71, 72], "truncate_prompt_tokens": 2}).json()["data"][0]["embedding"] == vector(
        [70, 71]
    )
    long = {"input": [70] * 600}
    assert_error(embedder.post(EMBEDDINGS, long), 400, param="input", code="context_length_exceeded")
    assert_error(embedder.post(EMBEDDINGS, {"input": [70, TRIGGERS["reject"]]}), 400, param="input", code="invalid_value")
    assert embedder.post(EMBEDDINGS, {**long, "truncate_prompt_tokens": -1}).json()["usage"]["prompt_tokens"] == 511


def cosines_with_themselves(embedder: RunningServer) -> list[float]:
    texts = [letter * number for letter in "abcdefg" for number in (1, 3, 7)]
    return [item["score"] for item in embedder.post(SCORE, {"text_1": texts, "text_2": texts}).json()["data"]]


def test_score(embedder: RunningServer) -> None:
    texts = ["one two", "three", "one three"]
    vectors = [vector(TOKENIZER.encode(text)) for text in texts]
    body = embedder.post(SCORE, {"text_1": texts[0], "text_2": texts}).json()
    assert [item["score"] for item in body["data"]] == pytest.approx([cosine(vectors[0], v) for v in vectors])
    assert body["data"][0]["score"] == pytest.approx(1) and max(cosines_with_themselves(embedder)) <= 1
    assert [item["index"] for item in body["data"]] == [0, 1, 2]
    pairs = embedder.post("/score", {"text_1": texts[:2], "text_2": texts[1:]}).json()
    assert [item["score"] for item in pairs["data"]] == pytest.approx([cosine(vectors[i], vectors[i + 1]) for i in (0, 1)])
    assert_error(embedder.post(SCORE, {"text_1": texts[:2], "text_2": texts}), 400, param="text_1")


def test_rerank(embedder: RunningServer) -> None:
    query, documents = "[[", ["z" * 40, "[[", "[ and more"]
    vectors = [vector(TOKENIZER.encode(text)) for text in (query, *documents)]
    scores = [cosine(vectors[0], v) for v in vectors[1:]]
    order = sorted(range(3), key=lambda i: (-scores[i], i))
    for path in (RERANK, "/v2/rerank", "/rerank"):
        results = embedder.post(path, {"query": query, "documents": documents}).json()["results"]
        assert [r["index"] for r in results] == order
        assert [r["relevance_score"] for r in results] == pytest.approx([scores[i] for i in order])
        assert [r["document"]["text"] for r in results] == [documents[i] for i in order]
    best = embedder.post(RERANK, {"query": query, "documents": documents, "top_n": 1, "return_documents": False}).json()["results"]
    assert [set(r) for r in best] == [{"index", "relevance_score"}] and best[0]["index"] == order[0]


def test_each_task_refuses_the_other(embedder: RunningServer, server: RunningServer) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "model": "tiny", "max_tokens": 1}
    for path, body in (
        ("/v1/chat/completions", chat),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", chat),
    ):
        answer = embedder.post(path, body)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "wrong_task", path
        assert "/v1/embeddings" in answer.json()["error"]["message"]
    for path, body in ((EMBEDDINGS, {"input": "a"}), (SCORE, {"text_1": "a", "text_2": "b"}), (RERANK, {"query": "a", "documents": ["b"]})):
        assert "--task embed" in assert_error(server.post(path, body), 400, code="wrong_task")
    assert embedder.post("/tokenize", {"prompt": "a"}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [""]}, "input"),
        ({"input": [400]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "dimensions": 64}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "model": "other"}, "model"),
        ({"input": "a" + WORDS["reject"]}, None),
    ],
)
def test_bad_bodies(embedder: RunningServer, fields: dict[str, Any], param: str | None) -> None:
    assert_error(embedder.post(EMBEDDINGS, fields), 404 if param == "model" else 400, param=param)


def test_an_engine_that_fails_on_one_input_fails_the_request_alone(embedder: RunningServer) -> None:
    assert_error(embedder.post(EMBEDDINGS, {"input": ["a", "b" + WORDS["bug"]]}), 500)
    embedder.wait_for_load(0, 0)
    assert embedder.post(EMBEDDINGS, {"input": "a"}).status_code == 200


def test_every_field_is_bounded() -> None:
    assert [walk(model) for model in (EmbeddingsRequest, ScoreRequest, RerankRequest)] == [[], [], []]


def test_nasty_values_in_every_field(embedder: RunningServer) -> None:
    bodies: list[tuple[str, Any, dict[str, Any]]] = [
        (EMBEDDINGS, EmbeddingsRequest, {"input": "a"}),
        (SCORE, ScoreRequest, {"text_1": "a", "text_2": "b"}),
        (RERANK, RerankRequest, {"query": "a", "documents": ["b"]}),
    ]
    for path, model, body in bodies:
        for name in model.model_fields:
            for value in NASTY:
                answer = embedder.post(path, {**body, name: value})
                if answer.status_code not in (200, 404):
                    assert_error(answer, 400)


def test_the_openai_client(embedder: RunningServer) -> None:
    openai = pytest.importorskip("openai", reason="the openai client is in the dev extra")
    client = openai.OpenAI(base_url=f"{embedder.url}/v1", api_key="x", max_retries=0, timeout=20)
    texts = ["one two", "three"]
    for extra in ({}, {"encoding_format": "float"}):  # by itself it asks for base64
        answer = client.embeddings.create(model="tiny", input=texts, **extra)
        assert [item.embedding for item in answer.data] == [vector(TOKENIZER.encode(text)) for text in texts]
    assert answer.usage.prompt_tokens == sum(len(TOKENIZER.encode(text)) for text in texts)
