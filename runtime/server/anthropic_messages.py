"""POST /v1/messages and /v1/messages/count_tokens: the chat of openai_chat.py in the words of Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
from starlette.requests import Request

from llmc.errors import RequestRejected
from llmc.runtime.server import sse
from llmc.runtime.server.answers import json_answer
from llmc.runtime.server.chat_prompt import chat_prompt
from llmc.runtime.server.chat_run import ChatRun, start_chat
from llmc.runtime.server.errors import error_object, name_fields
from llmc.runtime.server.front import Front
from llmc.runtime.server.generation import Delta
from llmc.runtime.server.message_blocks import MessageBlocks
from llmc.runtime.server.messages_frame import framed
from llmc.runtime.server.parse import parse_body, validated
from llmc.runtime.server.routes import Router
from llmc.runtime.server.schemas import ChatCompletionRequest
from llmc.runtime.server.schemas_messages import (
    CountTokensRequest,
    InputMessage,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from llmc.runtime.server.tool_choice import check_tools

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
_OWN_NAMES = {"stop": "stop_sequences", "response_format": "output_config", "reasoning_effort": "output_config"}  # of the chat's fields
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def messages_router(front: Front) -> Router:
    """The routes, bound to this server's parts."""
    router = Router()

    @router.post("/v1/messages")
    async def messages(request: Request) -> Any:
        body = parse_body(await request.body(), MessagesRequest)
        name_fields(request.scope, **_OWN_NAMES)
        run = await start_chat(front, request, validated(_as_chat(front, body), ChatCompletionRequest))
        answer = _Answer(body.model, run, request.scope["llmc.request_id"])
        if body.stream:
            return await sse.start(answer.events(), run.generation.close, failure=_failure_event)
        try:
            return json_answer(await answer.whole())
        finally:
            run.generation.close()

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Any:
        body = parse_body(await request.body(), CountTokensRequest)
        name_fields(request.scope, **_OWN_NAMES)
        front.check_model(body.model)
        chat = validated(_as_chat(front, body), ChatCompletionRequest)
        check_tools(front, chat)
        prompt = await chat_prompt(front, chat)
        return json_answer({"input_tokens": len(prompt.token_ids)})

    return router


def _failure_event(message: str, status: int, param: str | None, code: str | None) -> bytes:
    return sse.named_event(framed(error_object(message, status=status, param=param, code=code), status))


def _as_chat(front: Front, body: CountTokensRequest) -> dict[str, Any]:
    """The same request as a chat request."""
    chat: dict[str, Any] = {"model": body.model, "messages": _conversation(body), **_thinking(front, body)}
    chat["continue_final_message"] = body.messages[-1].role == "assistant"
    if body.tools is not None:
        chat["tools"] = [
            {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": t.input_schema}}
            for t in body.tools
        ]
    choice = body.tool_choice
    if choice is not None:
        if (choice.type == "tool") != (choice.name is not None):
            raise RequestRejected("tool_choice: a name goes with the type tool, and only with it", param="tool_choice")
        named = {"type": "function", "function": {"name": choice.name}}
        chat["tool_choice"] = named if choice.type == "tool" else _CHOICES[choice.type]
        chat["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    if body.output_config is not None:
        chat["reasoning_effort"] = body.output_config.effort
        if body.output_config.format is not None:
            named_schema = {"name": "response", "schema": body.output_config.format.schema_}
            chat["response_format"] = {"type": "json_schema", "json_schema": named_schema}
    if isinstance(body, MessagesRequest):
        chat |= {"max_tokens": body.max_tokens, "stop": body.stop_sequences, "temperature": body.temperature}
        chat |= {"top_k": body.top_k, "top_p": body.top_p}
    return chat


def _thinking(front: Front, body: CountTokensRequest) -> dict[str, Any]:
    """Templates that can do without reasoning have a variable for it; reasoning that is not wanted is left out in any case."""
    wanted = body.thinking
    if wanted is None:
        return {}
    template, shown = front.model.chat_template, wanted.type != "disabled"
    given: dict[str, Any] = {"include_reasoning": shown and wanted.display != "omitted"}
    if template is not None and "enable_thinking" in template.variables:
        given["chat_template_kwargs"] = {"enable_thinking": shown}
    return given


def _conversation(body: CountTokensRequest) -> list[dict[str, Any]]:
    """Turns as chat messages; neighbours of one role are one turn, as in Anthropic's API."""
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system)})
    for turn in body.messages:
        for message in _chat_messages(turn):
            last: dict[str, Any] = messages[-1] if messages else {"role": ""}
            if message["role"] != last["role"] or message["role"] == "tool":
                messages.append(message)
                continue
            last["content"] = "\n".join(text for text in (last["content"], message["content"]) if text)
            if "tool_calls" in message:
                last["tool_calls"] = [*last.get("tool_calls", []), *message["tool_calls"]]
            if "reasoning" in message:
                last["reasoning"] = "\n".join(filter(None, (last.get("reasoning"), message["reasoning"])))
    return messages


def _chat_messages(turn: InputMessage) -> list[dict[str, Any]]:
    """One turn's messages: a tool's results are messages of their own, before the turn's text."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    message: dict[str, Any] = {"role": turn.role}
    for block in turn.content:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolResultBlock):
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content or "")})
        elif turn.role != "assistant":
            raise RequestRejected(f"messages: {block.type} blocks stand in turns of the assistant only", param="messages")
        elif isinstance(block, ThinkingBlock):
            message["reasoning"] = message.get("reasoning", "") + block.thinking
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": orjson.dumps(block.input).decode()}
            message.setdefault("tool_calls", []).append({"id": block.id, "type": "function", "function": function})
    if results and turn.role != "user":
        raise RequestRejected("messages: tool_result blocks stand in turns of the user only", param="messages")
    message["content"] = "\n".join(texts)
    return results if results and not texts else [*results, message]


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


class _Answer:
    """Shapes one generation as a message or its events."""

    def __init__(self, model: str, run: ChatRun, request_id: str) -> None:
        self._run = run
        self._reply = run.replies[0]
        self._blocks = MessageBlocks()
        self._end: Delta | None = None
        self._frame = {"id": f"msg_{request_id}", "type": "message", "role": "assistant", "model": model}

    async def whole(self) -> dict[str, Any]:
        """The unstreamed answer."""
        async for _ in self._parts():
            continue
        self._blocks.close()
        return {**self._frame, "content": self._blocks.content(), **self._stop(), "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """The streamed answer."""
        begun = False
        async for events in self._parts():
            if not begun:
                begun = True
                start: dict[str, Any] = {**self._frame, "content": [], "stop_reason": None, "stop_sequence": None, "usage": self._usage()}
                events = [{"type": "message_start", "message": start}, *events]
            if events:
                yield b"".join(map(sse.named_event, events))
        last = [*self._blocks.close(), {"type": "message_delta", "delta": self._stop(), "usage": self._usage()}, {"type": "message_stop"}]
        yield b"".join(map(sse.named_event, last))

    async def _parts(self) -> AsyncIterator[list[dict[str, Any]]]:
        async for deltas in self._run.generation.deltas():
            events: list[dict[str, Any]] = []
            for delta in deltas:
                for piece in self._reply.add(delta.text, delta.finish_reason):
                    events += self._blocks.add(piece, self._reply.call_id(piece))
                if delta.finish_reason is not None:
                    self._end = delta
            yield events

    def _stop(self) -> dict[str, Any]:
        end = self._end
        assert end is not None
        reason = self._reply.finish_reason(end.finish_reason)
        sequence = end.stop_reason if isinstance(end.stop_reason, str) else None
        word = _STOP_REASONS.get(reason or "", "stop_sequence" if sequence is not None else "end_turn")
        return {"stop_reason": word, "stop_sequence": sequence}

    def _usage(self) -> dict[str, int]:
        """Tokens; those found in the prefix cache are counted apart, as in Anthropic's API."""
        generation = self._run.generation
        cached = generation.num_cached_tokens
        return {
            "input_tokens": generation.num_prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": generation.num_output_tokens,
        }
