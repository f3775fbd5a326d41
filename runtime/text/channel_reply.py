"""Replies made of messages on channels: reasoning on one, the answer on another, tool calls addressed to a recipient."""

from __future__ import annotations

import re

from llmc.runtime.text.json_scanner import WHITE_SPACE, JsonScanner, Scan, control_escaped
from llmc.runtime.text.reply import Piece, find_marker
from llmc.runtime.text.reply_formats import ChannelFormat
from llmc.runtime.text.tool_call_reader import TOOL_NAME

_MAX_HEADER_CHARS = 600
_BETWEEN = "\n"  # stands between two messages of the same kind


class ChannelReply:
    """A ReplyParser. The reply is in one mode at a time: open, header, body, call, gap.

    Args:
        format: the marks.
        calls: whether messages to tools are tool calls; else they are content.
        opened: header of the message the prompt ends in; None: the prompt ends where a header is expected.
    """

    def __init__(self, format: ChannelFormat, *, calls: bool, opened: str | None = None) -> None:
        self._format = format
        self._calls = calls
        self._buffer = ""
        self._mode = "open"
        self._kind: str = "content"
        self._new_message = False  # the next text of a kind that was there before needs a line between
        self._seen: set[str] = set()
        self._num_calls = 0
        self._scanner = JsonScanner()
        self._raw: list[str] = []
        self._begun = False  # within the call's JSON
        self._ended = False  # the call's JSON is whole
        self._out: list[Piece] = []
        if opened is not None:
            self._open_message(opened)

    def push(self, text: str) -> list[Piece]:
        """See ReplyParser."""
        self._buffer += text
        while self._buffer and getattr(self, "_in_" + self._mode)():
            continue
        return self._given()

    def finish(self, *, cut: bool) -> list[Piece]:
        """See ReplyParser."""
        if self._mode == "call":
            self._end_call()
        elif self._mode in ("body", "open") and not cut:
            self._text(self._buffer)
        self._buffer = ""
        return self._given()

    def _given(self) -> list[Piece]:
        out, self._out = self._out, []
        return out

    def _text(self, text: str) -> None:
        if not text:
            return
        kind = "reasoning" if self._kind == "reasoning" else "content"
        if self._new_message and kind in self._seen:
            text = _BETWEEN + text
        self._new_message = False
        self._seen.add(kind)
        self._out.append(Piece(kind, text))  # type: ignore[arg-type]

    def _in_open(self) -> bool:
        """The reply's first characters: a header, or plain text from a model that forgot its format."""
        seen = self._buffer.lstrip()
        beginnings = (self._format.start, self._format.channel, self._format.message, self._format.recipient)
        if seen.startswith(beginnings):
            self._mode = "header"
            return True
        if not seen or any(mark.startswith(seen) for mark in beginnings):
            return False
        self._mode = "body"
        return True

    def _in_header(self) -> bool:
        at = self._buffer.find(self._format.message)
        if at < 0:
            if len(self._buffer) <= _MAX_HEADER_CHARS:
                return False
            at = _MAX_HEADER_CHARS  # no header is so long: it is text
            self._kind, self._mode = "content", "body"
            self._text(self._buffer[:at])
            self._buffer = self._buffer[at:]
            return True
        header, self._buffer = self._buffer[:at], self._buffer[at + len(self._format.message) :]
        if at > _MAX_HEADER_CHARS:
            self._kind, self._mode = "content", "body"
            self._text(header)
            return True
        self._open_message(header)
        return True

    def _open_message(self, header: str) -> None:
        channel = _after(header, self._format.channel)
        recipient = _after(header, self._format.recipient)
        prefix = self._format.tool_recipient
        name = recipient.removeprefix(prefix)
        self._kind = "reasoning" if channel in self._format.reasoning else "content"
        self._new_message = True
        self._mode = "body"
        if self._calls and recipient.startswith(prefix) and TOOL_NAME.fullmatch(name):
            self._mode = "call"
            self._scanner, self._raw, self._begun, self._ended = JsonScanner(), [], False, False
            self._out.append(Piece("call", name, self._num_calls))

    def _in_body(self) -> bool:
        at, marker = find_marker(self._buffer, (*self._format.ends, self._format.start, self._format.channel))
        self._text(self._buffer[:at])
        self._leave(at, marker)
        return marker is not None

    def _leave(self, at: int, marker: str | None) -> None:
        """Drop what was read, and with it the mark that ends a message; a mark that begins one stays."""
        if marker in self._format.ends:
            self._buffer, self._mode, self._new_message = self._buffer[at + len(marker or "") :], "gap", True
        else:
            self._buffer = self._buffer[at:]
            if marker is not None:
                self._mode = "header"

    def _in_gap(self) -> bool:
        """Between messages."""
        at, marker = find_marker(self._buffer, (self._format.start, self._format.channel))
        self._kind = "content"
        if self._buffer[:at].strip():
            self._buffer, self._mode = self._buffer.lstrip(), "body"  # text outside any message
            return True
        self._buffer = self._buffer[at:]
        if marker is not None:
            self._mode = "header"
        return marker is not None

    def _in_call(self) -> bool:
        at, marker = find_marker(self._buffer, (*self._format.ends, self._format.start, self._format.channel))
        given: list[str] = []
        for index, char in enumerate(self._buffer[:at]):
            self._raw.append(char)
            escaped = control_escaped(char, self._scanner)
            if not self._fits(char):
                self._arguments(given)
                self._break_call()
                self._buffer, self._mode = self._buffer[index + 1 :], "body"
                return True
            if self._begun:
                given.append(escaped)
            self._begun = self._begun and not self._ended
        self._arguments(given)
        if marker is not None:
            self._end_call()
        self._leave(at, marker)
        return marker is not None

    def _fits(self, char: str) -> bool:
        """Whether a character continues one JSON object with white space around it. Changes the state."""
        if self._ended or (not self._begun and char != "{"):
            return char in WHITE_SPACE
        self._begun = True
        scan = self._scanner.feed(char)
        self._ended = scan is Scan.DONE
        return scan is not Scan.BAD

    def _arguments(self, given: list[str]) -> None:
        if given:
            self._out.append(Piece("arguments", "".join(given), self._num_calls))

    def _end_call(self) -> None:
        """The message to a tool is over: it was a call if its JSON is whole; no text at all means no arguments."""
        if not self._ended and not "".join(self._raw).strip():
            self._arguments(["{}"])
            self._ended = True
        if self._ended:
            self._num_calls += 1
        else:
            self._break_call()

    def _break_call(self) -> None:
        between = _BETWEEN if "content" in self._seen else ""
        self._seen.add("content")
        self._new_message, self._kind = False, "content"
        self._out.append(Piece("broken", between + "".join(self._raw), self._num_calls))
        self._num_calls += 1


def _after(header: str, mark: str) -> str:
    """The word after a mark in a header."""
    found = re.match(r"[^\s<]*", header.partition(mark)[2])
    return found[0] if found else ""
