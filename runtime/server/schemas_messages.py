"""What clients of Anthropic's Messages API may send. Every field has a bound; the rules are those of schemas.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from pydantic import Discriminator, Field, Tag

from llmc.runtime.server.schemas import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_STOPS,
    MAX_TOKEN_ID,
    MAX_TOOLS,
    TEXT_OR_LIST,
    FailFast,
    JsonObject,
    ModelName,
    RequestModel,
    StopText,
    Text,
    ToolName,
)

Id = Annotated[str, MinLen(1), MaxLen(256)]


class CacheControl(RequestModel):
    """Asks for what the prefix cache does anyway."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class _Block(RequestModel):
    cache_control: CacheControl | None = None


class TextBlock(_Block):
    type: Literal["text"]
    text: Text
    citations: Annotated[list[JsonObject], MaxLen(MAX_PARTS), FailFast()] | None = None  # of an earlier answer; no template reads them


class ThinkingBlock(_Block):
    """Reasoning of an earlier turn. It is signed by nobody here, so its signature is not read."""

    type: Literal["thinking"]
    thinking: Text
    signature: Text | None = None


class ToolUseBlock(_Block):
    type: Literal["tool_use"]
    id: Id
    name: ToolName
    input: JsonObject


TextOrBlocks = Annotated[
    Annotated[Text, Tag("#text")] | Annotated[list[TextBlock], MaxLen(MAX_PARTS), FailFast(), Tag("#list")], TEXT_OR_LIST
]


class ToolResultBlock(_Block):
    type: Literal["tool_result"]
    tool_use_id: Id
    content: TextOrBlocks | None = None
    is_error: bool | None = None  # templates have no place for it; the content says what went wrong


_BLOCKS = ("thinking", "tool_use", "tool_result")


def _block_kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"#{kind}" if kind in _BLOCKS else "#text"


Block = Annotated[
    Annotated[TextBlock, Tag("#text")]
    | Annotated[ThinkingBlock, Tag("#thinking")]
    | Annotated[ToolUseBlock, Tag("#tool_use")]
    | Annotated[ToolResultBlock, Tag("#tool_result")],
    Discriminator(_block_kind),
]


class InputMessage(RequestModel):
    role: Literal["user", "assistant", "system"]
    content: Annotated[Annotated[Text, Tag("#text")] | Annotated[list[Block], MaxLen(MAX_PARTS), FailFast(), Tag("#list")], TEXT_OR_LIST]


class MessagesTool(_Block):
    name: ToolName
    description: Text | None = None
    input_schema: JsonObject
    type: Literal["custom"] | None = None
    strict: bool | None = None


class MessagesToolChoice(RequestModel):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None  # with type "tool"
    disable_parallel_tool_use: bool | None = None


class Thinking(RequestModel):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[int, Ge(0), Le(MAX_TOKEN_ID)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class JsonOutput(RequestModel):
    type: Literal["json_schema"]
    schema_: Annotated[JsonObject, Field(alias="schema")]


class OutputConfig(RequestModel):
    effort: Literal["low", "medium", "high", "xhigh"] | None = None
    format: JsonOutput | None = None


class UserMetadata(RequestModel):
    user_id: Annotated[str, MaxLen(512)] | None = None


class CountTokensRequest(RequestModel):
    """What both endpoints read: everything that becomes the prompt."""

    model: ModelName
    messages: Annotated[list[InputMessage], MinLen(1), MaxLen(MAX_MESSAGES), FailFast()]
    system: TextOrBlocks | None = None
    tools: Annotated[list[MessagesTool], MaxLen(MAX_TOOLS), FailFast()] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None


class MessagesRequest(CountTokensRequest):
    max_tokens: Annotated[int, Ge(1), Le(MAX_TOKEN_ID)]
    stop_sequences: Annotated[list[StopText], MaxLen(MAX_STOPS), FailFast()] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Ge(0), Le(100)] | None = None
    top_k: Annotated[int, Ge(0), Le(MAX_TOKEN_ID)] | None = None
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    metadata: UserMetadata | None = None
