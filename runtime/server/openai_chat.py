"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request

from llmc.runtime.server import sse
from llmc.runtime.server.answers import json_answer
from llmc.runtime.server.chat_prompt import text_of
from llmc.runtime.server.chat_run import ChatRun, start_chat
from llmc.runtime.server.front import Front
from llmc.runtime.server.generation import Delta
from llmc.runtime.server.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from llmc.runtime.server.parse import parse_body
from llmc.runtime.server.routes import Router
from llmc.runtime.server.schemas import ChatCompletionRequest

_ROLE = "assistant"


def chat_router(front: Front) -> Router:
    """The route, bound to this server's parts."""
    router = Router()

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Any:
        body = parse_body(await request.body(), ChatCompletionRequest)
        run = await start_chat(front, request, body)
        answer = _Answer(front, body, run, request.scope["llmc.request_id"])
        if body.stream:
            return await sse.start(answer.chunks(), run.generation.close)
        try:
            return json_answer(await answer.whole())
        finally:
            run.generation.close()

    return router


class _Answer:
    """Shapes one generation as chat completion objects."""

    def __init__(self, front: Front, body: ChatCompletionRequest, run: ChatRun, request_id: str) -> None:
        self._front = front
        self._tokenizer = front.model.tokenizer
        self._body = body
        self._generation = run.generation
        self._replies = run.replies
        self._prompt = run.prompt
        self._names = TokenNames(front.model.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        options = body.stream_options
        self._include_usage = bool(options and options.include_usage)
        self._continuous_usage = bool(options and options.continuous_usage_stats)
        self._n = body.n or 1
        self._echo = text_of(body.messages[-1]) if body.echo else ""
        self._frame = {"id": f"chatcmpl-{request_id}", "created": front.now(), "model": body.model or front.model.name}

    async def whole(self) -> dict[str, Any]:
        """The unstreamed answer."""
        entries: list[list[Any]] = [[] for _ in range(self._n)]
        ids: list[list[int]] = [[] for _ in range(self._n)]
        ends: list[Delta | None] = [None] * self._n
        prompt_entries = None
        async for deltas in self._generation.deltas():
            for delta in deltas:
                self._replies[delta.index].add(delta.text, delta.finish_reason)
                entries[delta.index].extend(delta.logprobs or [])
                ids[delta.index].extend(delta.token_ids)
                prompt_entries = delta.prompt_logprobs or prompt_entries
                if delta.finish_reason is not None:
                    ends[delta.index] = delta
        choices = []
        for index, end in enumerate(ends):
            assert end is not None
            choice = {
                "index": index,
                "message": self._replies[index].message(self._echo),
                "logprobs": chat_logprobs(self._names, entries[index]) if self._body.logprobs else None,
                "finish_reason": self._replies[index].finish_reason(end.finish_reason),
                "stop_reason": end.stop_reason,
            }
            if self._body.return_token_ids:
                choice["token_ids"] = ids[index]
            choices.append(choice)
        answer = {**self._frame, "object": "chat.completion", "choices": choices, "usage": self._generation.usage()}
        answer["system_fingerprint"] = self._front.model.fingerprint
        if prompt_entries is not None:
            answer["prompt_logprobs"] = prompt_logprobs(self._tokenizer, prompt_entries)
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = self._prompt
        if self._body.return_metrics:
            answer["metrics"] = self._generation.timing()
        return answer

    async def chunks(self) -> AsyncIterator[bytes]:
        """The streamed answer, event by event. A choice's first event carries its role."""
        frame = {**self._frame, "object": "chat.completion.chunk", "system_fingerprint": self._front.model.fingerprint}
        if self._include_usage:
            frame["usage"] = None
        opened: set[int] = set()
        async for deltas in self._generation.deltas():
            out = b""
            for delta in deltas:
                if delta.index not in opened:
                    first = {"prompt_token_ids": self._prompt} if self._body.return_token_ids and not opened else {}
                    opened.add(delta.index)
                    out += sse.event({**frame, "choices": [_chunk(delta.index, {"role": _ROLE, "content": self._echo})], **first})
                out += self._chunk_of(frame, delta)
            if out:
                yield out
        last = {"usage": self._generation.usage()} if self._include_usage else {}
        if self._body.return_metrics:
            last["metrics"] = self._generation.timing()
        if last:
            yield sse.event({**frame, "choices": [], **last})
        yield sse.DONE

    def _chunk_of(self, frame: dict[str, Any], delta: Delta) -> bytes:
        logprobs = chat_logprobs(self._names, delta.logprobs) if self._body.logprobs and delta.logprobs else None
        reply = self._replies[delta.index]
        shown = [reply.delta(piece) for piece in reply.add(delta.text, delta.finish_reason)]
        shows_ids = self._body.return_token_ids and delta.token_ids
        if not shown:
            if logprobs is None and delta.finish_reason is None and not shows_ids:
                return b""
            shown = [{"content": ""} if logprobs else {}]
        choices = [_chunk(delta.index, part) for part in shown]
        # Tokens belong to the event, not to one of its parts: they stand in the first chunk, the end in the last.
        choices[0]["logprobs"] = logprobs
        if self._body.return_token_ids:
            for number, choice in enumerate(choices):
                choice["token_ids"] = [] if number else delta.token_ids
        if delta.finish_reason is not None:
            choices[-1]["finish_reason"], choices[-1]["stop_reason"] = reply.finish_reason(delta.finish_reason), delta.stop_reason
        usage = {"usage": self._generation.running_usage(delta.index)} if self._continuous_usage else {}
        return b"".join(sse.event({**frame, "choices": [choice], **usage}) for choice in choices)


def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
