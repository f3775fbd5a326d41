"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request

from llmc.errors import RequestRejected
from llmc.runtime.server import sse
from llmc.runtime.server.answers import json_answer
from llmc.runtime.server.chat_prompt import chat_prompt, text_of
from llmc.runtime.server.chat_reply import ChatReply, chat_replies
from llmc.runtime.server.front import Front
from llmc.runtime.server.generation import Delta, Generation
from llmc.runtime.server.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from llmc.runtime.server.parse import parse_body
from llmc.runtime.server.sampling import bad_word_ids, sampling_params, truncated
from llmc.runtime.server.schemas import ChatCompletionRequest, NamedTool

_ROLE = "assistant"


def chat_router(front: Front) -> APIRouter:
    """The route, bound to this server's parts."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Any:
        body = parse_body(await request.body(), ChatCompletionRequest)
        front.check_model(body.model)
        _check_fields(front, body)
        rendered = await chat_prompt(
            front,
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            add_special_tokens=body.add_special_tokens,
            variables=body.chat_template_kwargs,
            tools=body.tools,
            reasoning_effort=body.reasoning_effort,
        )
        max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        (prompt,) = truncated(front, body, [rendered.token_ids], max_tokens)
        sampling = sampling_params(
            front,
            body,
            [prompt],
            max_tokens=max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
            bad_words=await bad_word_ids(front, body),
        )
        generation = Generation(
            front,
            request,
            [prompt],
            sampling,
            priority=body.priority or 0,
            cache_salt=body.cache_salt,
            shown_special=front.model.reply_marks,
        )
        answer = _Answer(front, body, generation, chat_replies(front, body, rendered), prompt, request.scope["llmc.request_id"])
        if body.stream:
            return await sse.start(answer.chunks(), generation.close)
        try:
            return json_answer(await answer.whole())
        finally:
            generation.close()

    return router


def _check_tools(front: Front, body: ChatCompletionRequest) -> None:
    choice = body.tool_choice
    if choice is not None and choice != "none" and not body.tools:
        raise RequestRejected("tool_choice needs tools", param="tool_choice")
    if choice == "required" or isinstance(choice, NamedTool):
        raise RequestRejected("tool_choice: forcing a call needs structured output, which is not built yet; use auto", param="tool_choice")
    if not body.tools:
        return
    names = [tool.function.name for tool in body.tools]
    if len(set(names)) != len(names):
        raise RequestRejected("tools: two functions have the same name", param="tools", code="invalid_value")
    if any(tool.function.strict for tool in body.tools):
        raise RequestRejected("tools: strict needs structured output, which is not built yet; leave it out", param="tools")
    if choice != "none" and front.model.replies.tools is None:
        raise RequestRejected(
            "tools: how this model writes tool calls is not certain from its chat template; serve it with --tool-call-parser",
            param="tools",
            code="no_tool_call_parser",
        )


def _check_fields(front: Front, body: ChatCompletionRequest) -> None:
    if body.top_logprobs and not body.logprobs:
        raise RequestRejected("top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.max_tokens == 0:
        raise RequestRejected("max_tokens must be at least 1", param="max_tokens")
    sse.check_options(body)
    _check_tools(front, body)
    if body.echo and body.messages[-1].role != _ROLE:
        raise RequestRejected("echo repeats the last message, which must then be the assistant's", param="echo")


class _Answer:
    """Shapes one generation as chat completion objects."""

    def __init__(
        self,
        front: Front,
        body: ChatCompletionRequest,
        generation: Generation,
        replies: list[ChatReply],
        prompt: list[int],
        request_id: str,
    ) -> None:
        self._front = front
        self._tokenizer = front.model.tokenizer
        self._body = body
        self._generation = generation
        self._replies = replies
        self._prompt = prompt
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
