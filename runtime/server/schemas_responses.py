"""What clients of POST /v1/responses may send. Every field has a bound; the rules are those of schemas.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from pydantic import Discriminator, Field, Tag

from llmc.runtime.server.schemas import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOKEN_ID,
    MAX_TOOLS,
    TEXT_OR_LIST,
    WORD_OR_TOOL,
    Effort,
    FailFast,
    JsonObject,
    ModelName,
    RequestModel,
    Stops,
    Text,
    ToolName,
)

Id = Annotated[str, MinLen(1), MaxLen(256)]
Status = Literal["in_progress", "completed", "incomplete"]
Objects = Annotated[list[JsonObject], MaxLen(MAX_PARTS), FailFast()]


class ResponsePart(RequestModel):
    """Text of a message; `annotations` and `logprobs` come back from earlier answers and are not read."""

    type: Literal["input_text", "output_text", "reasoning_text", "text"]
    text: Text
    annotations: Objects | None = None
    logprobs: Objects | None = None


PartsOrText = Annotated[
    Annotated[Text, Tag("#text")] | Annotated[list[ResponsePart], MaxLen(MAX_PARTS), FailFast(), Tag("#list")], TEXT_OR_LIST
]


class MessageItem(RequestModel):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: PartsOrText
    id: Id | None = None
    status: Status | None = None


class CallItem(RequestModel):
    type: Literal["function_call"]
    call_id: Id
    name: ToolName
    arguments: Text
    id: Id | None = None
    status: Status | None = None


class CallOutputItem(RequestModel):
    type: Literal["function_call_output"]
    call_id: Id
    output: PartsOrText
    id: Id | None = None
    status: Status | None = None


class ReasoningItem(RequestModel):
    type: Literal["reasoning"]
    id: Id | None = None
    summary: Objects | None = None
    content: Annotated[list[ResponsePart], MaxLen(MAX_PARTS), FailFast()] | None = None
    status: Status | None = None


_ITEMS = ("function_call", "function_call_output", "reasoning")


def _item_kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"#{kind}" if kind in _ITEMS else "#message"


Item = Annotated[
    Annotated[MessageItem, Tag("#message")]
    | Annotated[CallItem, Tag("#function_call")]
    | Annotated[CallOutputItem, Tag("#function_call_output")]
    | Annotated[ReasoningItem, Tag("#reasoning")],
    Discriminator(_item_kind),
]


class ResponseTool(RequestModel):
    type: Literal["function"]
    name: ToolName
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class NamedResponseTool(RequestModel):
    type: Literal["function"]
    name: ToolName


class Reasoning(RequestModel):
    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None  # reasoning is given whole; there is no summary of it


class TextFormatOf(RequestModel):
    """The form of the text; json_schema has its schema beside the type here."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, MinLen(1), MaxLen(256)] | None = None
    description: Text | None = None
    schema_: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextSettings(RequestModel):
    format: TextFormatOf | None = None


class ResponsesRequest(RequestModel):
    model: ModelName | None = None
    input: Annotated[
        Annotated[Text, Tag("#text")] | Annotated[list[Item], MinLen(1), MaxLen(MAX_MESSAGES), FailFast(), Tag("#list")],
        TEXT_OR_LIST,
    ]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Ge(1), Le(MAX_TOKEN_ID)] | None = None
    temperature: Annotated[float, Ge(0), Le(100)] | None = None
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    stream: bool | None = None
    tools: Annotated[list[ResponseTool], MaxLen(MAX_TOOLS), FailFast()] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("#word")] | Annotated[NamedResponseTool, Tag("#tool")],
            WORD_OR_TOOL,
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextSettings | None = None
    store: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    metadata: Annotated[dict[Annotated[str, MaxLen(64)], Annotated[str, MaxLen(512)]], MaxLen(16)] | None = None
    user: Annotated[str, MaxLen(512)] | None = None
    safety_identifier: Annotated[str, MaxLen(512)] | None = None
    prompt_cache_key: Annotated[str, MaxLen(512)] | None = None
    seed: Annotated[int, Ge(-(2**63)), Le(2**63 - 1)] | None = None  # from here on vLLM's
    top_k: Annotated[int, Ge(-1), Le(MAX_TOKEN_ID)] | None = None
    repetition_penalty: Annotated[float, Gt(0), Le(1000)] | None = None
    stop: Stops | None = None
    cache_salt: Annotated[str, MinLen(1), MaxLen(1024)] | None = None
    priority: Annotated[int, Ge(-(2**31)), Le(2**31 - 1)] | None = None
