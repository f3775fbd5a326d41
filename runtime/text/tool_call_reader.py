"""Tool calls written as JSON, read character by character, so that arguments can be streamed while they are written."""

from __future__ import annotations

import json
import re
from enum import Enum
from itertools import groupby

from llmc.runtime.text.json_scanner import WHITE_SPACE, JsonScanner, Scan, control_escaped
from llmc.runtime.text.reply import Piece
from llmc.runtime.text.reply_formats import ToolFormat

TOOL_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,256}")
_MAX_HEADER_CHARS = 600  # name and what stands between it and the arguments


class Reading(Enum):
    MORE = "more"
    DONE = "done"  # every call that began is complete, with this character
    FAILED = "failed"  # this character does not continue a call; it was not taken


class ToolCallReader:
    """Reads what stands after a begin mark. `pieces` grows; the caller empties it.

    Args:
        format: how the calls are written.
        raw: the begin mark, for the case that this is no call.
        first: number of the first call.
        known: names of the tools given; a name outside fails. None: any name.
    """

    def __init__(self, format: ToolFormat, raw: str, first: int, known: frozenset[str] | None) -> None:
        self._format = format
        self._known = known
        self.num_calls = first
        self.pieces: list[Piece] = []
        self._raw = [raw]  # of the call being read, and what stands before it
        self._whole = False  # what was read is all given out
        self._state = "gap"
        self._in_list = False
        self._scanner = JsonScanner()
        self._key = ""
        self._value = ""
        self._begun = False  # the call's name has been given out
        self._arguments: list[str] = []  # read before the name was known
        self._quoted: list[str] = []  # arguments as a JSON string
        self._has_arguments = False

    def feed(self, char: str) -> Reading:
        """Take one character."""
        reading = self._STEPS[self._state](self, char)
        if reading is not Reading.FAILED:
            self._raw.append(char)
            if self._whole:
                self._raw, self._whole = [], False
        return reading

    def take(self) -> list[Piece]:
        """The pieces so far, neighbours joined. Empties `pieces`."""
        pieces, self.pieces = self.pieces, []
        joined: list[Piece] = []
        for (kind, call), run in groupby(pieces, key=lambda piece: (piece.kind, piece.call)):
            joined.append(Piece(kind, "".join(piece.text for piece in run), call))
        return joined

    def abandon(self) -> None:
        """What was read since the last whole call is text."""
        raw = "".join(self._raw)
        if self._begun:
            self.pieces.append(Piece("broken", raw, self.num_calls))
            self.num_calls += 1  # a stream's reader has seen this number
        elif raw:
            self.pieces.append(Piece("content", raw))

    def _gap(self, char: str) -> Reading:
        if char in WHITE_SPACE:
            return Reading.MORE
        if char == "{":
            self._key, self._begun, self._arguments, self._has_arguments = "", False, [], False
            self._state = "first_key"
        elif char == "[" and self._format.list and not self._in_list:
            self._in_list = True
        elif self._format.named and not self._in_list and TOOL_NAME.fullmatch(char):
            self._state, self._value = "header", char
        else:
            return Reading.FAILED
        return Reading.MORE

    def _header(self, char: str) -> Reading:
        """A name before the arguments, perhaps with marks in brackets between them."""
        if char != "{":
            self._value += char
            return Reading.MORE if len(self._value) <= _MAX_HEADER_CHARS and char != "\n" else Reading.FAILED
        name = self._value.split("[", 1)[0].strip()
        if not self._accept_name(name):
            return Reading.FAILED
        self._state, self._scanner, self._has_arguments = "named_arguments", JsonScanner(), True
        return self._stream(char)

    def _named_arguments(self, char: str) -> Reading:
        reading = self._stream(char)
        return self._call_ended() if self._state == "comma" and reading is Reading.MORE else reading

    def _next_key(self, char: str) -> Reading:
        if char in WHITE_SPACE:
            return Reading.MORE
        if char != '"':
            return Reading.FAILED
        self._state, self._value = "key", char
        return Reading.MORE

    def _key_text(self, char: str) -> Reading:
        return self._string(char, "colon")

    def _string(self, char: str, then: str) -> Reading:
        """Gather a short string, quotes included."""
        if char < " " or len(self._value) > _MAX_HEADER_CHARS:
            return Reading.FAILED
        self._value += char
        ended = char == '"' and (len(self._value) - len(self._value[:-1].rstrip("\\"))) % 2 == 1
        if not ended:
            return Reading.MORE
        text = _decoded(self._value)
        if text is None:
            return Reading.FAILED
        if then == "colon":
            self._key = text
        elif not self._accept_name(text):
            return Reading.FAILED
        self._state = then
        return Reading.MORE

    def _colon(self, char: str) -> Reading:
        if char in WHITE_SPACE:
            return Reading.MORE
        if char != ":":
            return Reading.FAILED
        self._state, self._scanner, self._quoted = "value", JsonScanner(), []
        return Reading.MORE

    def _value_start(self, char: str) -> Reading:
        if char in WHITE_SPACE:
            return Reading.MORE
        if self._key == self._format.name_key:
            if char != '"' or self._begun:
                return Reading.FAILED
            self._state, self._value = "name", char
            return Reading.MORE
        if self._key in self._format.arguments_keys:
            if self._has_arguments:
                return Reading.FAILED
            self._has_arguments = True
            if char == "{":
                self._state = "arguments"
                return self._stream(char)
            if char not in '"n':
                return Reading.FAILED
            self._state = "quoted_arguments"  # JSON within a JSON string, or null
        else:
            self._state = "other"
        return self.feed_value(char)

    def feed_value(self, char: str) -> Reading:
        """A value that is read whole, or passed over."""
        scan = self._scanner.feed(char)
        if scan is Scan.BAD or (char < " " and self._scanner.in_string):
            return Reading.FAILED
        quoted = self._state == "quoted_arguments"
        if scan is Scan.DONE_BEFORE:
            self._state = "comma"
            return self._comma(char)
        if quoted:
            self._quoted.append(char)
        if scan is Scan.DONE:
            self._state = "comma"
            if quoted and not self._take_quoted():
                return Reading.FAILED
        return Reading.MORE

    def _take_quoted(self) -> bool:
        """Give out arguments that stood in a JSON string; whether they are an object."""
        quoted = "".join(self._quoted)
        text = "" if quoted == "null" else _decoded(quoted)
        if text is None:
            return False
        text = text.strip() or "{}"
        scanner = JsonScanner()
        whole = text[0] == "{" and all(scanner.feed(char) is Scan.MORE for char in text[:-1]) and scanner.feed(text[-1]) is Scan.DONE
        if not whole or any(char < " " for char in text):
            return False
        self._give(text)
        return True

    def _stream(self, char: str) -> Reading:
        """Arguments as an object: given out as they come."""
        escaped = control_escaped(char, self._scanner)
        scan = self._scanner.feed(char)
        if scan is Scan.BAD:
            return Reading.FAILED
        self._give(escaped)
        if scan is Scan.DONE:
            self._state = "comma"
        return Reading.MORE

    def _give(self, text: str) -> None:
        if self._begun:
            self.pieces.append(Piece("arguments", text, self.num_calls))
        else:
            self._arguments.append(text)

    def _accept_name(self, name: str) -> bool:
        if TOOL_NAME.fullmatch(name) is None or (self._known is not None and name not in self._known):
            return False
        self._begun = True
        self.pieces.append(Piece("call", name, self.num_calls))
        if self._arguments:
            self.pieces.append(Piece("arguments", "".join(self._arguments), self.num_calls))
        return True

    def _comma(self, char: str) -> Reading:
        if char in WHITE_SPACE:
            return Reading.MORE
        if char == ",":
            self._state = "next_key"
            return Reading.MORE
        return self._call_ended() if char == "}" and self._begun else Reading.FAILED

    def _call_ended(self) -> Reading:
        if not self._has_arguments:
            self._give("{}")
        self.num_calls += 1
        self._begun, self._whole = False, True
        self._state = "list_comma" if self._in_list else "gap"
        return Reading.MORE if self._in_list else Reading.DONE

    def _list_comma(self, char: str) -> Reading:
        if char in WHITE_SPACE:
            return Reading.MORE
        if char == ",":
            self._state = "gap"
            return Reading.MORE
        self._whole = char == "]"
        return Reading.DONE if char == "]" else Reading.FAILED

    _STEPS = {  # noqa: RUF012 - the automaton's table, never changed
        "gap": _gap,
        "header": _header,
        "named_arguments": _named_arguments,
        "first_key": _next_key,
        "next_key": _next_key,
        "key": _key_text,
        "colon": _colon,
        "value": _value_start,
        "name": lambda self, char: self._string(char, "comma"),
        "other": feed_value,
        "quoted_arguments": feed_value,
        "arguments": _stream,
        "comma": _comma,
        "list_comma": _list_comma,
    }


def _decoded(quoted: str) -> str | None:
    """The text of a JSON string, None if it is none or holds half a surrogate pair."""
    try:
        text = json.loads(quoted)
        text.encode()
    except (ValueError, AttributeError):
        return None
    return text
