"""Replies whose reasoning stands between two tags and whose tool calls are JSON between marks."""

from __future__ import annotations

from llmc.runtime.text.reply import Piece, PieceKind, TrimmedText, find_marker
from llmc.runtime.text.reply_formats import ReasoningFormat, ToolFormat
from llmc.runtime.text.tool_call_reader import Reading, ToolCallReader


class TaggedReply:
    """A ReplyParser. The reply is in one mode at a time: start, reasoning, content, call, after_call.

    Args:
        reasoning: tags of the reasoning; None: it is not separated.
        tools: how calls are written; None: none are looked for.
        tool_names: names of the tools the model was given.
        in_reasoning: whether the prompt opened the reasoning; None: the reply's own first tag says.
    """

    def __init__(
        self, *, reasoning: ReasoningFormat | None, tools: ToolFormat | None, tool_names: frozenset[str], in_reasoning: bool | None
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._tool_names = tool_names
        self._buffer = ""
        self._num_calls = 0
        self._reader: ToolCallReader | None = None
        self._text = TrimmedText(start=False, end=False)
        self._mode = "start"
        self._bare_possible = tools is not None and tools.bare
        self._out: list[Piece] = []
        if reasoning is not None and in_reasoning:
            self._enter_reasoning()
        elif reasoning is None or in_reasoning is False:
            self._enter_content(trimmed=False)

    def push(self, text: str) -> list[Piece]:
        """See ReplyParser."""
        self._buffer += text
        while self._buffer and getattr(self, "_in_" + self._mode)():
            continue
        return self._given()

    def finish(self, *, cut: bool) -> list[Piece]:
        """See ReplyParser."""
        if self._mode == "call" and self._reader is not None:
            self._reader.abandon()
            self._out.extend(self._reader.take())
        elif self._mode in ("start", "reasoning", "content"):
            kind: PieceKind = "reasoning" if self._mode == "reasoning" else "content"
            # What is still in the buffer is the beginning of a tag, or white space before one.
            left = "" if cut and self._buffer.strip() else self._buffer
            last = self._text.push(left)
            self._emit(kind, last + (self._text.finish() if kind == "content" else ""))
        self._buffer = ""
        return self._given()

    def _given(self) -> list[Piece]:
        out, self._out = self._out, []
        return out

    def _emit(self, kind: PieceKind, text: str) -> None:
        if text:
            self._out.append(Piece(kind, text))

    def _in_start(self) -> bool:
        """Nothing but white space so far: an opening tag, or content. Returns whether to go on."""
        assert self._reasoning is not None
        seen = self._buffer.lstrip()
        if seen.startswith(self._reasoning.open):
            self._buffer = seen[len(self._reasoning.open) :]
            self._enter_reasoning()
            return True
        if self._reasoning.open.startswith(seen):
            return False
        self._enter_content(trimmed=False)
        return True

    def _enter_reasoning(self) -> None:
        self._mode, self._text = "reasoning", TrimmedText(start=True, end=True)

    def _in_reasoning(self) -> bool:
        assert self._reasoning is not None
        if self._text.empty:
            # A model may repeat the tag that its prompt ended with.
            seen = self._buffer.lstrip()
            if seen.startswith(self._reasoning.open):
                self._buffer = seen[len(self._reasoning.open) :]
                return True
            if self._reasoning.open.startswith(seen):
                return False
        at, marker = find_marker(self._buffer, (self._reasoning.close,))
        self._emit("reasoning", self._text.push(self._buffer[:at]))
        self._buffer = self._buffer[at + len(marker or "") :]
        if marker is None:
            return False
        self._enter_content(trimmed=True)
        return True

    def _enter_content(self, *, trimmed: bool) -> None:
        """`trimmed`: something stood before, so white space at the start belongs to its tag."""
        self._mode, self._text = "content", TrimmedText(start=trimmed, end=self._tools is not None)

    def _in_content(self) -> bool:
        if self._tools is None:
            self._emit("content", self._text.push(self._buffer))
            self._buffer = ""
            return False
        if self._bare_possible:
            seen = self._buffer.lstrip()
            if not seen:
                return False
            self._bare_possible = False
            if seen[0] == "{":
                # Known names only: a reply may well be JSON without being a call.
                self._reader = ToolCallReader(self._tools, self._buffer[: -len(seen)], self._num_calls, self._tool_names)
                self._buffer, self._mode = seen, "call"
                return True
        at, marker = find_marker(self._buffer, (self._tools.begin,))
        self._emit("content", self._text.push(self._buffer[:at]))
        self._buffer = self._buffer[at + len(marker or "") :]
        if marker is None:
            return False
        self._reader, self._mode = ToolCallReader(self._tools, marker, self._num_calls, None), "call"
        return True

    def _in_call(self) -> bool:
        assert self._reader is not None
        reading = Reading.MORE
        for index, char in enumerate(self._buffer):
            reading = self._reader.feed(char)
            if reading is not Reading.MORE:
                self._buffer = self._buffer[index + (reading is Reading.DONE) :]
                break
        else:
            self._buffer = ""
        if reading is Reading.FAILED:
            self._reader.abandon()
            self._enter_content(trimmed=False)
        elif reading is Reading.DONE:
            self._mode = "after_call"
        self._out.extend(self._reader.take())
        self._num_calls = self._reader.num_calls
        return reading is not Reading.MORE

    def _in_after_call(self) -> bool:
        """White space, the mark that closes a call, or the next call."""
        assert self._tools is not None
        seen = self._buffer.lstrip()
        for mark in (self._tools.end, self._tools.separator):
            if mark and seen.startswith(mark):
                self._buffer = seen[len(mark) :]
                if mark == self._tools.end:
                    self._enter_content(trimmed=True)
                return True
            if mark and mark.startswith(seen):
                return False
        if not seen:
            return False
        if self._tools.bare and seen[0] == "{":
            self._reader = ToolCallReader(self._tools, "", self._num_calls, self._tool_names)
            self._buffer, self._mode = seen, "call"
            return True
        self._enter_content(trimmed=True)
        return True
