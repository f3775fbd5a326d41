"""POST /v1/embeddings, /v1/score and /v1/rerank, of artifacts compiled with --task embed."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import Request

from llmc.errors import RequestRejected
from llmc.runtime.messages import SamplingParams
from llmc.runtime.sampling_params import check_token_ids
from llmc.runtime.server.answers import json_answer
from llmc.runtime.server.errors import name_fields
from llmc.runtime.server.front import Front
from llmc.runtime.server.generation import Generation, check_task
from llmc.runtime.server.parse import parse_body
from llmc.runtime.server.routes import Router
from llmc.runtime.server.sampling import MAX_REQUEST_TOKENS
from llmc.runtime.server.schemas_embeddings import EmbeddingsRequest, PooledFields, RerankRequest, ScoreRequest

if TYPE_CHECKING:
    import numpy as np

_POOLED = SamplingParams(max_tokens=1)


def embeddings_router(front: Front) -> Router:
    """The routes, bound to this server's parts."""
    router = Router()

    @router.post("/v1/embeddings")
    async def embeddings(request: Request) -> Any:
        body = parse_body(await request.body(), EmbeddingsRequest)
        name_fields(request.scope, prompt="input")
        check_task(front, pool=True)
        front.check_model(body.model)
        given: Any = [body.input] if isinstance(body.input, str) else body.input
        if isinstance(given[0], str):
            prompts = await _encode(front, body, given)
        else:
            prompts = [given] if isinstance(given[0], int) else given
        vectors, usage = await _vectors(front, request, body, prompts)
        shown = _as_base64 if body.encoding_format == "base64" else _as_numbers
        data = [{"object": "embedding", "index": index, "embedding": shown(vector)} for index, vector in enumerate(vectors)]
        return json_answer({**_frame(front, request, body, "embd"), "object": "list", "data": data, "usage": usage})

    async def score(request: Request) -> Any:
        body = parse_body(await request.body(), ScoreRequest)
        check_task(front, pool=True)
        front.check_model(body.model)
        first, second = ([text] if isinstance(text, str) else text for text in (body.text_1, body.text_2))
        if len(first) not in (1, len(second)):
            raise RequestRejected(
                f"text_1 has {len(first)} texts and text_2 {len(second)}; send one text_1 for all, or as many of both", param="text_1"
            )
        vectors, usage = await _vectors(front, request, body, await _encode(front, body, [*first, *second]))
        scores = _cosines(vectors[: len(first)], vectors[len(first) :])
        data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)]
        return json_answer({**_frame(front, request, body, "score"), "object": "list", "data": data, "usage": usage})

    async def rerank(request: Request) -> Any:
        body = parse_body(await request.body(), RerankRequest)
        check_task(front, pool=True)
        front.check_model(body.model)
        vectors, usage = await _vectors(front, request, body, await _encode(front, body, [body.query, *body.documents]))
        scores = _cosines(vectors[:1], vectors[1:])
        order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[: body.top_n or None]
        shown = {index: {} if body.return_documents is False else {"document": {"text": body.documents[index]}} for index in order}
        results = [{"index": index, **shown[index], "relevance_score": scores[index]} for index in order]
        return json_answer({**_frame(front, request, body, "rerank"), "results": results, "usage": usage})

    for path in ("/v1/score", "/score"):
        router.post(path)(score)
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        router.post(path)(rerank)
    return router


def _frame(front: Front, request: Request, body: PooledFields, kind: str) -> dict[str, Any]:
    return {"id": f"{kind}-{request.scope['llmc.request_id']}", "created": front.now(), "model": body.model or front.model.name}


async def _encode(front: Front, body: PooledFields, texts: list[str]) -> list[list[int]]:
    return await front.encode(texts, add_special_tokens=body.add_special_tokens is not False)


async def _vectors(front: Front, request: Request, body: PooledFields, prompts: list[list[int]]) -> tuple[list[bytes], dict[str, int]]:
    """The vector of each prompt, float32, and the usage object. As many at once as one request may have sequences.

    Raises:
        RequestRejected: a prompt is empty, too long, or holds an id outside the vocabulary.
    """
    room = front.max_model_len - 1
    most = body.truncate_prompt_tokens
    if most == 0:
        raise RequestRejected(
            "truncate_prompt_tokens is 0; send 1 or more, or -1 for what the context holds", param="truncate_prompt_tokens"
        )
    if most is not None:
        prompts = [prompt[: room if most == -1 else most] for prompt in prompts]  # the front of a text, as sentence-transformers
    for prompt in prompts:
        if not prompt:
            raise RequestRejected("an input has no tokens; send at least one", param="input")
        if len(prompt) > room:
            raise RequestRejected(
                f"an input has {len(prompt)} tokens; at most {room} fit (send truncate_prompt_tokens to cut it)",
                param="input",
                code="context_length_exceeded",
            )
        check_token_ids(prompt, vocab_size=front.model.vocab_size, param="input")
    num_tokens = sum(map(len, prompts))
    if num_tokens > MAX_REQUEST_TOKENS:
        raise RequestRejected(f"the inputs have {num_tokens} tokens; at most {MAX_REQUEST_TOKENS} are accepted at once", param="input")
    vectors: list[bytes] = []
    at_once = front.settings.max_sequences_per_request
    for start in range(0, len(prompts), at_once):
        vectors += await _some(front, request, prompts[start : start + at_once], body.priority or 0)
    return vectors, {"prompt_tokens": num_tokens, "completion_tokens": 0, "total_tokens": num_tokens}


async def _some(front: Front, request: Request, prompts: list[list[int]], priority: int) -> list[bytes]:
    generation = Generation(front, request, prompts, _POOLED, priority=priority, pool=True)
    found: dict[int, bytes] = {}
    try:
        async for deltas in generation.deltas():
            for delta in deltas:
                if delta.embedding is not None:
                    found[delta.index] = delta.embedding
    finally:
        generation.close()
    return [found[index] for index in range(len(prompts))]


def _as_base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode()


def _as_numbers(vector: bytes) -> orjson.Fragment:
    """The shortest decimals that are these float32 numbers."""
    return orjson.Fragment(orjson.dumps(_array(vector), option=orjson.OPT_SERIALIZE_NUMPY))


def _array(vector: bytes) -> np.ndarray:
    import numpy as np  # not on the start path: servers of text need none here

    return np.frombuffer(vector, dtype="<f4")


def _cosines(first: list[bytes], second: list[bytes]) -> list[float]:
    """Cosine of each pair; a single first vector goes with every second."""
    lefts, rights = ([_array(vector).astype("f8") for vector in vectors] for vectors in (first, second))
    lengths = [[float((v @ v) ** 0.5) or 1.0 for v in vectors] for vectors in (lefts, rights)]
    last = len(lefts) - 1
    found = (float(lefts[min(i, last)] @ right) / (lengths[0][min(i, last)] * lengths[1][i]) for i, right in enumerate(rights))
    return [min(1.0, max(-1.0, value)) for value in found]  # rounding may lead past the ends
