"""One choice of a chat answer as it grows: its text becomes content, reasoning and tool calls, whole or as deltas."""

from __future__ import annotations

import secrets
import string
from typing import Any

from llmc.runtime.messages import FinishReason
from llmc.runtime.server.chat_prompt import ChatPrompt
from llmc.runtime.server.front import Front
from llmc.runtime.server.schemas import ChatCompletionRequest
from llmc.runtime.server.tool_choice import is_forced
from llmc.runtime.text import ChannelFormat, ChannelReply, ForcedReply, Piece, ReasoningFormat, Reply, ReplyParser, TaggedReply, ToolFormat

_MAX_HEADER_CHARS = 256
_SHORT_ID_CHARS = string.ascii_letters + string.digits


class ChatReply:
    """Reads one choice.

    Args:
        parser: takes the text apart; None: all of it is content.
        reasoning: how the model writes reasoning, if it is separated; the answer then has its fields even when empty.
        tools: how the model writes tool calls, if they are looked for.
        include_reasoning: whether reasoning is shown.
        parallel: whether more than one call is given.
    """

    def __init__(
        self,
        parser: ReplyParser | None,
        *,
        reasoning: ReasoningFormat | None,
        tools: ToolFormat | None,
        include_reasoning: bool,
        parallel: bool,
    ) -> None:
        self._parser = parser
        self._reasoning = reasoning if include_reasoning else None
        self._include_reasoning = include_reasoning
        self._short_ids = tools is not None and tools.ids == "short"
        self._parallel = parallel
        self._reply = Reply()
        self._ids: dict[int, str] = {}

    def add(self, text: str, finish: FinishReason | None) -> list[Piece]:
        """Take the next text in, with `finish` the last; returns what it made certain and the client is to see."""
        if self._parser is None:
            pieces = [Piece("content", text)] if text else []
            self._reply.add(pieces)
            return pieces
        pieces = self._parser.push(text)
        if finish is not None:
            pieces += self._parser.finish(cut=finish == "length")
        shown = []
        for piece in pieces:
            if self._wanted(piece):
                self._reply.add([piece])  # one by one: what is wanted depends on those before
                shown.append(piece)
        return shown

    def _wanted(self, piece: Piece) -> bool:
        if piece.kind == "reasoning":
            return self._include_reasoning
        if piece.kind == "call":
            if self._reply.calls and not self._parallel:
                return False
            self._ids[piece.call] = self._new_id()
        return piece.call < 0 or piece.call in self._ids or piece.kind == "broken"

    def finish_reason(self, reason: FinishReason | None) -> str | None:
        """The reason as OpenAI names it: "tool_calls" where the model stopped to have tools called."""
        return "tool_calls" if reason == "stop" and self._reply.calls else reason

    def message(self, echo: str) -> dict[str, Any]:
        """`choices[].message`, once the reply is over. `echo` stands before the content."""
        content: str | None = echo + "".join(self._reply.content)
        reasoning = "".join(self._reply.reasoning)
        if not content and (reasoning or self._reply.calls):
            content = None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._reasoning is not None or reasoning:
            message["reasoning"] = message["reasoning_content"] = reasoning or None
        if self._reply.calls:
            message["tool_calls"] = [
                {"id": self._ids[number], "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for number, call in self._reply.calls.items()
            ]
        return message

    def call_id(self, piece: Piece) -> str | None:
        """The id of the call a piece belongs to."""
        return self._ids.get(piece.call)

    def delta(self, piece: Piece) -> dict[str, Any]:
        """`choices[].delta` of one piece."""
        if piece.kind == "reasoning":
            return {"reasoning": piece.text, "reasoning_content": piece.text}
        if piece.kind == "call":
            function = {"name": piece.text, "arguments": ""}
            return {"tool_calls": [{"index": piece.call, "id": self._ids[piece.call], "type": "function", "function": function}]}
        if piece.kind == "arguments":
            return {"tool_calls": [{"index": piece.call, "function": {"arguments": piece.text}}]}
        return {"content": piece.text}

    def _new_id(self) -> str:
        if self._short_ids:
            return "".join(secrets.choice(_SHORT_ID_CHARS) for _ in range(9))
        return "call_" + secrets.token_hex(12)


def chat_replies(front: Front, body: ChatCompletionRequest, prompt: ChatPrompt, *, formed: bool) -> list[ChatReply]:
    """One reader per choice. `formed`: a grammar says what the reply is, so it has no reasoning and no tags."""
    formats = front.model.replies
    tools = formats.tools if body.tools and body.tool_choice != "none" else None
    reasoning = formats.reasoning

    def parser() -> ReplyParser | None:
        if is_forced(body):
            return ForcedReply()
        if formed:
            return None
        if formats.channels is not None:
            return ChannelReply(formats.channels, calls=tools is not None, opened=open_header(formats.channels, prompt))
        if tools is None and reasoning is None:
            return None
        names = frozenset(tool.function.name for tool in body.tools or [])
        opened = prompt_in_reasoning(reasoning, prompt)
        return TaggedReply(reasoning=reasoning, tools=tools, tool_names=names, in_reasoning=opened)

    return [
        ChatReply(
            parser(),
            reasoning=reasoning,
            tools=tools,
            include_reasoning=body.include_reasoning is not False,
            parallel=body.parallel_tool_calls is not False,
        )
        for _ in range(body.n or 1)
    ]


def open_header(channels: ChannelFormat, prompt: ChatPrompt) -> str | None:
    """Header of the message that the prompt ends in; None if the reply begins a message of its own."""
    if prompt.continued is not None:
        return ""
    header = prompt.text[-_MAX_HEADER_CHARS:].rpartition(channels.start)[2]
    return header.removesuffix(channels.message) if header.endswith(channels.message) else None


def prompt_in_reasoning(reasoning: ReasoningFormat | None, prompt: ChatPrompt) -> bool | None:
    """Whether the reply begins within reasoning: as the prompt's last tag says; None: as its own first tag will say."""
    if reasoning is None:
        return None
    if prompt.continued is not None:
        return prompt.continued.rfind(reasoning.open) > prompt.continued.rfind(reasoning.close)
    end = prompt.text[-256:].rstrip()
    if end.endswith((reasoning.open, reasoning.close)):
        return end.endswith(reasoning.open)
    return True if reasoning.starts_open else None
