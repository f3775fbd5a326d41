"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request

from llmc.errors import RequestRejected
from llmc.runtime.server import sse
from llmc.runtime.server.answers import json_answer
from llmc.runtime.server.front import Front
from llmc.runtime.server.generation import Delta, Generation
from llmc.runtime.server.logprobs import chat_logprobs, prompt_logprobs
from llmc.runtime.server.parse import parse_body
from llmc.runtime.server.sampling import sampling_params
from llmc.runtime.server.schemas import ChatCompletionRequest, ChatMessage

_ROLE = "assistant"


def chat_router(front: Front) -> APIRouter:
    """The route, bound to this server's parts."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Any:
        body = parse_body(await request.body(), ChatCompletionRequest)
        front.check_model(body.model)
        _check_fields(body)
        prompt = await render_chat(
            front,
            body.messages,
            add_generation_prompt=body.add_generation_prompt is not False,
            add_special_tokens=bool(body.add_special_tokens),
        )
        sampling = sampling_params(
            front,
            body,
            [prompt],
            max_tokens=body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
        )
        generation = Generation(front, request, [prompt], sampling, priority=body.priority or 0)
        answer = _Answer(front, body, generation, request.scope["llmc.request_id"])
        if body.stream:
            return await sse.start(answer.chunks(), generation.close)
        try:
            return json_answer(await answer.whole())
        finally:
            generation.close()

    return router


async def render_chat(front: Front, messages: list[ChatMessage], *, add_generation_prompt: bool, add_special_tokens: bool) -> list[int]:
    """Token ids of a conversation, by the artifact's template."""
    if front.model.chat_template is None:
        raise RequestRejected(
            "this model has no chat template; use /v1/completions, or serve it with --chat-template",
            param="messages",
            code="no_chat_template",
        )
    plain = [{"role": m.role, "content": _text_of(m), **({"name": m.name} if m.name is not None else {})} for m in messages]
    text = front.model.chat_template.render(plain, add_generation_prompt)
    # The template writes the special tokens itself.
    (ids,) = await front.encode([text], add_special_tokens=add_special_tokens)
    return ids


def _text_of(message: ChatMessage) -> str:
    if isinstance(message.content, list):
        return "\n".join(part.text for part in message.content)
    return message.content or ""


def _check_fields(body: ChatCompletionRequest) -> None:
    if body.top_logprobs and not body.logprobs:
        raise RequestRejected("top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.max_tokens == 0:
        raise RequestRejected("max_tokens must be at least 1", param="max_tokens")
    if body.stream_options is not None and not body.stream:
        raise RequestRejected("stream_options needs stream to be true", param="stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise RequestRejected("prompt_logprobs cannot be streamed; leave stream out", param="prompt_logprobs")
    if body.echo and body.messages[-1].role != _ROLE:
        raise RequestRejected("echo repeats the last message, which must then be the assistant's", param="echo")


class _Answer:
    """Shapes one generation as chat completion objects."""

    def __init__(self, front: Front, body: ChatCompletionRequest, generation: Generation, request_id: str) -> None:
        self._front = front
        self._tokenizer = front.model.tokenizer
        self._body = body
        self._generation = generation
        self._n = body.n or 1
        self._echo = _text_of(body.messages[-1]) if body.echo else ""
        self._frame = {"id": f"chatcmpl-{request_id}", "created": front.now(), "model": body.model or front.model.name}

    async def whole(self) -> dict[str, Any]:
        """The unstreamed answer."""
        texts = [[self._echo] for _ in range(self._n)]
        entries: list[list[Any]] = [[] for _ in range(self._n)]
        ends: list[Delta | None] = [None] * self._n
        prompt_entries = None
        async for deltas in self._generation.deltas():
            for delta in deltas:
                texts[delta.index].append(delta.text)
                entries[delta.index].extend(delta.logprobs or [])
                prompt_entries = delta.prompt_logprobs or prompt_entries
                if delta.finish_reason is not None:
                    ends[delta.index] = delta
        choices = []
        for index, end in enumerate(ends):
            assert end is not None
            choices.append(
                {
                    "index": index,
                    "message": {"role": _ROLE, "content": "".join(texts[index]), "refusal": None},
                    "logprobs": chat_logprobs(self._tokenizer, entries[index]) if self._body.logprobs else None,
                    "finish_reason": end.finish_reason,
                    "stop_reason": end.stop_reason,
                }
            )
        answer = {**self._frame, "object": "chat.completion", "choices": choices, "usage": self._generation.usage()}
        answer["system_fingerprint"] = self._front.model.fingerprint
        if prompt_entries is not None:
            answer["prompt_logprobs"] = prompt_logprobs(self._tokenizer, prompt_entries)
        return answer

    async def chunks(self) -> AsyncIterator[bytes]:
        """The streamed answer, event by event. A choice's first event carries its role."""
        include_usage = bool(self._body.stream_options and self._body.stream_options.include_usage)
        frame = {**self._frame, "object": "chat.completion.chunk", "system_fingerprint": self._front.model.fingerprint}
        if include_usage:
            frame["usage"] = None
        opened: set[int] = set()
        async for deltas in self._generation.deltas():
            out = b""
            for delta in deltas:
                if delta.index not in opened:
                    opened.add(delta.index)
                    out += sse.event({**frame, "choices": [_chunk(delta.index, {"role": _ROLE, "content": self._echo})]})
                out += self._chunk_of(frame, delta)
            if out:
                yield out
        if include_usage:
            yield sse.event({**frame, "choices": [], "usage": self._generation.usage()})
        yield sse.DONE

    def _chunk_of(self, frame: dict[str, Any], delta: Delta) -> bytes:
        logprobs = chat_logprobs(self._tokenizer, delta.logprobs) if self._body.logprobs and delta.logprobs else None
        if not delta.text and logprobs is None and delta.finish_reason is None:
            return b""
        choice = _chunk(delta.index, {"content": delta.text} if delta.text or logprobs else {})
        choice["logprobs"] = logprobs
        if delta.finish_reason is not None:
            choice["finish_reason"], choice["stop_reason"] = delta.finish_reason, delta.stop_reason
        return sse.event({**frame, "choices": [choice]})


def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
