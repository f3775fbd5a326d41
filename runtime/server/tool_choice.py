"""Forced tool calls: `tool_choice` required or a named function becomes a grammar, which the reply follows from its first character.

The reply is then a JSON list of calls, `[{"name": ..., "parameters": {...}}]`, whatever format the model writes unasked.
"""

from __future__ import annotations

import json
from typing import Any

from llmc.errors import RequestRejected
from llmc.runtime.grammar.spec import grammar_of
from llmc.runtime.messages import StructuredOutputsParams
from llmc.runtime.server.front import Front
from llmc.runtime.server.schemas import ChatCompletionRequest, NamedTool, Tool


def check_tools(front: Front, body: ChatCompletionRequest) -> None:
    """Refuse tools that could not act.

    Raises:
        RequestRejected: naming the field.
    """
    choice = body.tool_choice
    if choice not in (None, "none", "auto") and not body.tools:
        raise RequestRejected("tool_choice needs tools", param="tool_choice")
    if not body.tools:
        return
    names = [tool.function.name for tool in body.tools]
    if len(set(names)) != len(names):
        raise RequestRejected("tools: two functions have the same name", param="tools", code="invalid_value")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise RequestRejected("tool_choice names a function that is not among tools", param="tool_choice", code="invalid_value")
    if is_forced(body):
        if front.model.replies.channels is not None:
            raise RequestRejected(
                "tool_choice: forcing a call is not built for models that reply in channels; use auto", param="tool_choice"
            )
        if body.continue_final_message:
            raise RequestRejected("tool_choice: a message that is continued cannot become a forced call", param="tool_choice")
    elif choice != "none" and front.model.replies.tools is None:
        raise RequestRejected(
            "tools: how this model writes tool calls is not certain from its chat template; serve it with --tool-call-parser",
            param="tools",
            code="no_tool_call_parser",
        )


def is_forced(body: ChatCompletionRequest) -> bool:
    """Whether the reply must be a call."""
    return bool(body.tools) and (body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool))


def forced_calls(body: ChatCompletionRequest) -> StructuredOutputsParams | None:
    """The grammar of a forced call; None if none is forced.

    Raises:
        RequestRejected: the tools' schemas are too large or too deep for a grammar.
    """
    if not is_forced(body):
        return None
    tools = body.tools or []
    single = body.parallel_tool_calls is False
    if isinstance(body.tool_choice, NamedTool):
        tools, single = [tool for tool in tools if tool.function.name == body.tool_choice.function.name], True
    more = "" if single else ' (", " call)*'
    calls = " | ".join(f"call_{number}" for number in range(len(tools)))
    lines = [f'start: "[" call{more} "]"', f"call: {calls}"]
    for number, tool in enumerate(tools):
        opening = json.dumps('{"name": ' + json.dumps(tool.function.name) + ', "parameters": ')
        lines.append(f'call_{number}: {opening} parameters_{number} "}}"')
        # A rule of its own: $ref within a schema is looked up from its root.
        lines.append(f"parameters_{number}: %json {_schema(tool)}")
    wanted = StructuredOutputsParams(grammar="\n".join(lines))
    try:
        grammar_of(wanted)
    except RequestRejected as error:
        raise RequestRejected(f"tools: {error}", param="tools", code=error.code) from None
    return wanted


def _schema(tool: Tool) -> str:
    parameters: dict[str, Any] = tool.function.parameters or {}
    if "type" not in parameters:
        parameters = {"type": "object", **parameters}
    # "::=" would make the grammar look like another notation.
    return json.dumps(parameters).replace("::=", "\\u003a:=")
