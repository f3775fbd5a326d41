"""A conversation becomes the token ids the model is prompted with, by the artifact's own template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import orjson

from llmc.errors import RequestRejected
from llmc.runtime.server.front import Front
from llmc.runtime.server.parse import check_shape
from llmc.runtime.server.schemas import ChatCompletionRequest, ChatMessage, TemplateVariables, TokenizeRequest, Tool, ToolCall
from llmc.runtime.text import ChatTemplate


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatPrompt:
    """What the model reads, as text and as tokens."""

    text: str
    token_ids: list[int]
    continued: str | None = None  # the last message's text, when the reply goes on with it


async def chat_prompt(front: Front, body: ChatCompletionRequest | TokenizeRequest) -> ChatPrompt:
    """Render and encode a conversation.

    Args:
        body: with messages. Of its other fields add_generation_prompt opens the assistant's turn at the end (None: unless the final
            message is continued), and add_special_tokens lets the tokenizer add its own (None: no, the template writes them itself).

    Raises:
        RequestRejected: there is no template, it refuses the messages, or it does not read a variable or the tools.
    """
    template = front.model.chat_template
    if template is None:
        raise RequestRejected(
            "this model has no chat template; use /v1/completions, or serve it with --chat-template",
            param="messages",
            code="no_chat_template",
        )
    if body.continue_final_message and body.add_generation_prompt:
        raise RequestRejected(
            "continue_final_message goes on with the last message, add_generation_prompt opens a new one; send one of them",
            param="continue_final_message",
        )
    if body.tools and not template.reads_tools:
        raise RequestRejected("the model's chat template does not show tools, so the model would not know of them", param="tools")
    given = allowed_variables(template, body.chat_template_kwargs)
    effort = body.reasoning_effort if isinstance(body, ChatCompletionRequest) else None
    if effort is not None:
        if "reasoning_effort" not in template.variables:
            raise RequestRejected("the model's chat template does not read reasoning_effort", param="reasoning_effort")
        given["reasoning_effort"] = effort
    if body.tools:
        given["tools"] = [_plain_tool(tool) for tool in body.tools]
    history = front.model.replies.reasoning.history if front.model.replies.reasoning is not None else ("reasoning_content",)
    plain = [plain_message(message, history) for message in body.messages or []]
    opened = body.add_generation_prompt is not False and not body.continue_final_message
    text = _rendered(template, plain, opened, given)
    continued = plain[-1]["content"] if body.continue_final_message else None
    if continued is not None:
        text = cut_at_final_message(text, continued)
    (ids,) = await front.encode([text], add_special_tokens=bool(body.add_special_tokens))
    return ChatPrompt(text=text, token_ids=ids, continued=continued)


def _rendered(template: ChatTemplate, plain: list[dict[str, Any]], opened: bool, given: dict[str, Any]) -> str:
    """Render; some templates take a call's arguments as text and fail on the object that most take."""
    try:
        return template.render(plain, opened, **given)
    except RequestRejected as refusal:
        if not any("tool_calls" in message for message in plain):
            raise
        try:
            return template.render([_with_text_arguments(message) for message in plain], opened, **given)
        except RequestRejected:
            raise refusal from None  # the arguments' form was not the reason


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in message.get("tool_calls", [])
    ]
    return {**message, "tool_calls": calls} if calls else message


def plain_message(message: ChatMessage, history: tuple[str, ...]) -> dict[str, Any]:
    """A message as templates read it. `history`: where the template reads an earlier turn's reasoning.

    Raises:
        RequestRejected: a tool call outside the assistant's messages, or one whose arguments are no JSON object.
    """
    plain: dict[str, Any] = {"role": message.role, "content": text_of(message)}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        if message.role != "assistant":
            raise RequestRejected("messages: tool_calls stand in messages of the assistant only", param="messages", code="invalid_value")
        plain["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
    reasoning = message.reasoning_content or message.reasoning
    if reasoning and message.role == "assistant":
        plain |= dict.fromkeys(history, reasoning)
    return plain


def _plain_call(call: ToolCall) -> dict[str, Any]:
    """Templates write arguments with tojson, so they are given as the object they are."""
    text = call.function.arguments
    try:
        arguments = orjson.loads(text) if text and text.strip() else {}
    except orjson.JSONDecodeError:
        arguments = None
    if not isinstance(arguments, dict):
        raise RequestRejected("messages: arguments of a tool call must be a JSON object, as text", param="messages", code="invalid_value")
    check_shape(arguments)
    plain: dict[str, Any] = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    return plain if call.id is None else {"id": call.id, **plain}


def _plain_tool(tool: Tool) -> dict[str, Any]:
    return {"type": "function", "function": tool.function.model_dump(include={"name", "description", "parameters"}, exclude_unset=True)}


def text_of(message: ChatMessage) -> str:
    """The message's text; parts stand on lines of their own."""
    if isinstance(message.content, list):
        return "\n".join(part.text for part in message.content)
    return message.content or message.refusal or ""


def allowed_variables(template: ChatTemplate, variables: TemplateVariables | None) -> dict[str, Any]:
    """chat_template_kwargs, if the template reads each of them and none is the server's own; nulls mean absent."""
    given = {name: value for name, value in (variables or {}).items() if value is not None}
    for name in given:
        if name not in template.variables:
            known = ", ".join(sorted(template.variables)[:20]) or "none"
            raise RequestRejected(
                f"the model's chat template has no variable of this name that a request may set; it has: {known}",
                param="chat_template_kwargs",
                code="invalid_value",
            )
    return given


def cut_at_final_message(text: str, content: str) -> str:
    """The rendered text up to the end of the last message's content, as transformers cuts it.

    Raises:
        RequestRejected: the message is empty, or the template does not show it as it is.
    """
    bare = content.strip()
    start = text.rfind(bare) if bare else -1
    if start < 0:
        raise RequestRejected(
            "continue_final_message needs a last message with text that the chat template shows as it stands",
            param="continue_final_message",
        )
    # Trailing white space belongs to what is continued, unless the template dropped it.
    whole = content.lstrip()
    end = start + (len(whole) if text.startswith(whole, start) else len(bare))
    return text[:end]
