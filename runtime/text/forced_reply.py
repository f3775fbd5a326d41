"""Replies that a grammar forces to be a JSON list of tool calls."""

from __future__ import annotations

from llmc.runtime.text.reply import Piece
from llmc.runtime.text.reply_formats import ToolFormat
from llmc.runtime.text.tool_call_reader import Reading, ToolCallReader

FORCED = ToolFormat(name="forced", name_key="name", arguments_keys=("parameters",), list=True)


class ForcedReply:
    """A ReplyParser. What is no call after all, as when the reply was cut off, is content."""

    def __init__(self) -> None:
        self._reader: ToolCallReader | None = ToolCallReader(FORCED, "", 0, None)

    def push(self, text: str) -> list[Piece]:
        """See ReplyParser."""
        for index, char in enumerate(text):
            if self._reader is None:
                return self._content(text[index:])
            reading = self._reader.feed(char)
            if reading is Reading.MORE:
                continue
            if reading is Reading.FAILED:
                self._reader.abandon()
            pieces, self._reader = self._reader.take(), None
            return pieces + self._content(text[index + (reading is Reading.DONE) :])
        return self._reader.take() if self._reader is not None else []

    def finish(self, *, cut: bool) -> list[Piece]:
        """See ReplyParser."""
        if self._reader is None:
            return []
        self._reader.abandon()
        pieces, self._reader = self._reader.take(), None
        return pieces

    def _content(self, text: str) -> list[Piece]:
        return [Piece("content", text)] if text else []
