"""POST /v1/responses, stateless: the chat of openai_chat.py in the items and events of OpenAI's newer API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request

from llmc.errors import RequestRejected
from llmc.runtime.server import sse
from llmc.runtime.server.answers import json_answer
from llmc.runtime.server.chat_run import ChatRun, start_chat
from llmc.runtime.server.errors import name_fields
from llmc.runtime.server.front import Front
from llmc.runtime.server.parse import parse_body, validated
from llmc.runtime.server.response_items import ResponseItems
from llmc.runtime.server.routes import Router
from llmc.runtime.server.schemas import ChatCompletionRequest
from llmc.runtime.server.schemas_responses import (
    CallItem,
    CallOutputItem,
    MessageItem,
    NamedResponseTool,
    ReasoningItem,
    ResponsePart,
    ResponsesRequest,
)

_OWN_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text",
    "reasoning_effort": "reasoning",
}  # of the chat's fields
_AS_THEY_ARE = ("seed", "top_k", "repetition_penalty", "stop", "cache_salt", "priority")  # fields that are the chat's too


def responses_router(front: Front) -> Router:
    """The route, bound to this server's parts."""
    router = Router()

    @router.post("/v1/responses")
    async def responses(request: Request) -> Any:
        body = parse_body(await request.body(), ResponsesRequest)
        name_fields(request.scope, **_OWN_NAMES)
        run = await start_chat(front, request, validated(_as_chat(body), ChatCompletionRequest))
        answer = _Answer(front, body, run, request.scope["llmc.request_id"])
        if body.stream:
            return await sse.start(answer.events(), run.generation.close)
        try:
            return json_answer(await answer.whole())
        finally:
            run.generation.close()

    return router


def _as_chat(body: ResponsesRequest) -> dict[str, Any]:
    """The same request as a chat request."""
    chat: dict[str, Any] = {
        "model": body.model,
        "messages": _messages(body),
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": body.reasoning.effort if body.reasoning is not None else None,
        "tool_choice": body.tool_choice,
        **{name: getattr(body, name) for name in _AS_THEY_ARE},
    }
    if body.tools is not None:
        functions = [tool.model_dump(exclude={"type"}, exclude_unset=True) for tool in body.tools]
        chat["tools"] = [{"type": "function", "function": function} for function in functions]
    if isinstance(body.tool_choice, NamedResponseTool):
        chat["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice.name}}
    wanted = body.text.format if body.text is not None else None
    if wanted is not None:
        if (wanted.type == "json_schema") != (wanted.schema_ is not None):
            raise RequestRejected("text.format: a schema goes with the type json_schema, and only with it", param="text")
        chat["response_format"] = {"type": wanted.type}
        if wanted.schema_ is not None:
            chat["response_format"]["json_schema"] = {"name": wanted.name or "response", "schema": wanted.schema_, "strict": wanted.strict}
    return chat


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """Items as chat messages: calls and reasoning join the assistant's message they stand with."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    reasoning: str | None = None
    for item in body.input:
        if isinstance(item, ReasoningItem):
            reasoning = _text(item.content or []) or reasoning
        elif isinstance(item, CallOutputItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        elif isinstance(item, CallItem):
            call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
            if messages and messages[-1]["role"] == "assistant":
                messages[-1].setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": "assistant", "content": "", "tool_calls": [call], "reasoning": reasoning})
                reasoning = None
        elif isinstance(item, MessageItem):
            role = "system" if item.role == "developer" else item.role  # templates know the older name
            messages.append({"role": role, "content": _text(item.content)})
            if role == "assistant" and reasoning is not None:
                messages[-1]["reasoning"], reasoning = reasoning, None
    return messages


def _text(content: str | list[ResponsePart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class _Answer:
    """Shapes one generation as a response object or its events."""

    def __init__(self, front: Front, body: ResponsesRequest, run: ChatRun, request_id: str) -> None:
        self._front = front
        self._run = run
        self._reply = run.replies[0]
        self._items = ResponseItems(request_id)
        self._finish: str | None = None
        choice = body.tool_choice
        self._frame: dict[str, Any] = {
            "id": f"resp_{request_id}",
            "object": "response",
            "created_at": front.now(),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model or front.model.name,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}} if body.text is None else body.text.model_dump(by_alias=True, exclude_none=True),
            "tool_choice": choice.model_dump() if isinstance(choice, NamedResponseTool) else choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or []],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    async def whole(self) -> dict[str, Any]:
        """The unstreamed answer."""
        async for _ in self._parts():
            continue
        return await self._ended()

    async def events(self) -> AsyncIterator[bytes]:
        """The streamed answer."""
        number = 0

        def encoded(events: list[dict[str, Any]]) -> bytes:
            nonlocal number
            out = b""
            for event in events:
                out += sse.named_event({**event, "sequence_number": number})
                number += 1
            return out

        yield encoded([{"type": f"response.{name}", "response": self._frame} for name in ("created", "in_progress")])
        async for events in self._parts():
            if events:
                yield encoded(events)
        response = await self._ended()
        yield encoded([{"type": f"response.{response['status']}", "response": response}])

    async def _parts(self) -> AsyncIterator[list[dict[str, Any]]]:
        async for deltas in self._run.generation.deltas():
            events: list[dict[str, Any]] = []
            for delta in deltas:
                for piece in self._reply.add(delta.text, delta.finish_reason):
                    events += self._items.add(piece, self._reply.call_id(piece))
                if delta.finish_reason is not None:
                    self._finish = delta.finish_reason
            yield events
        yield self._items.close(cut=self._finish == "length")

    async def _ended(self) -> dict[str, Any]:
        cut = self._finish == "length"
        usage = self._run.generation.usage()
        reasoning = self._items.reasoning_text()
        (reasoning_ids,) = await self._front.encode([reasoning], add_special_tokens=False)
        return {
            **self._frame,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._items.output(cut=cut),
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": min(len(reasoning_ids), usage["completion_tokens"])},
                "total_tokens": usage["total_tokens"],
            },
        }
