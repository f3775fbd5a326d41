"""One JSON value, read character by character: is what came so far the beginning of one, and where does it end?"""

from __future__ import annotations

import json
import re
from enum import Enum

_MAX_DEPTH = 64
_MAX_NUMBER_CHARS = 512
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NUMBER_CHARS = frozenset("0123456789+-.eE")
_LITERALS = {"t": "true", "f": "false", "n": "null"}
WHITE_SPACE = frozenset(" \t\n\r")


class Scan(Enum):
    MORE = "more"
    DONE = "done"  # the value ended with this character
    DONE_BEFORE = "done before"  # it ended with the character before: numbers have no end of their own
    BAD = "bad"  # no JSON begins so


class JsonScanner:
    """A pushdown automaton over one value. White space before it is taken. After DONE or BAD it must not be fed again.

    Control characters within strings are let through, for the reader to escape: models write them, JSON forbids them.
    """

    def __init__(self) -> None:
        self._stack: list[str] = []
        self._state = "value"
        self._in_key = False
        self._token = ""  # of a number or a literal

    @property
    def in_string(self) -> bool:
        return self._state == "string"

    def feed(self, char: str) -> Scan:
        """Take one character."""
        state = self._state
        if state == "string":
            return self._string(char)
        if state == "number":
            return self._number(char)
        if state == "literal":
            return self._literal(char)
        if state == "escape":
            if char not in '"\\/bfnrtu':
                return Scan.BAD
            self._state, self._token = ("hex", "") if char == "u" else ("string", "")
            return Scan.MORE
        if state == "hex":
            if char not in "0123456789abcdefABCDEF":
                return Scan.BAD
            self._token += char
            if len(self._token) == 4:
                self._state = "string"
            return Scan.MORE
        if char in WHITE_SPACE:
            return Scan.MORE
        return self._structure(char)

    def _structure(self, char: str) -> Scan:
        state = self._state
        if state == "colon":
            self._state = "value"
            return Scan.MORE if char == ":" else Scan.BAD
        if state == "comma":
            if char == ",":
                self._state = "key" if self._stack[-1] == "{" else "value"
                return Scan.MORE
            return self._close(char)
        if state in ("key", "first_key"):
            if char == '"':
                self._state, self._in_key = "string", True
                return Scan.MORE
            return self._close(char) if state == "first_key" else Scan.BAD
        if state == "first_value" and char == "]":
            return self._close(char)
        return self._begin(char)

    def _begin(self, char: str) -> Scan:
        if char == '"':
            self._state, self._in_key = "string", False
        elif char in "{[":
            if len(self._stack) == _MAX_DEPTH:
                return Scan.BAD
            self._stack.append(char)
            self._state = "first_key" if char == "{" else "first_value"
        elif char == "-" or (char.isascii() and char.isdigit()):
            self._state, self._token = "number", char
        elif char in _LITERALS:
            self._state, self._token = "literal", char
        else:
            return Scan.BAD
        return Scan.MORE

    def _close(self, char: str) -> Scan:
        if char != ("}" if self._stack[-1] == "{" else "]"):
            return Scan.BAD
        self._stack.pop()
        return self._ended()

    def _ended(self) -> Scan:
        self._state = "comma"
        return Scan.MORE if self._stack else Scan.DONE

    def _string(self, char: str) -> Scan:
        if char == "\\":
            self._state = "escape"
        elif char == '"':
            if self._in_key:
                self._state, self._in_key = "colon", False
                return Scan.MORE
            return self._ended()
        return Scan.MORE

    def _number(self, char: str) -> Scan:
        if char in _NUMBER_CHARS:
            self._token += char
            return Scan.MORE if len(self._token) <= _MAX_NUMBER_CHARS else Scan.BAD
        if _NUMBER.fullmatch(self._token) is None:
            return Scan.BAD
        if self._ended() is Scan.DONE:
            return Scan.DONE_BEFORE
        return Scan.MORE if char in WHITE_SPACE else self._structure(char)

    def _literal(self, char: str) -> Scan:
        word = _LITERALS[self._token[0]]
        self._token += char
        if not word.startswith(self._token):
            return Scan.BAD
        return self._ended() if self._token == word else Scan.MORE


def control_escaped(char: str, scanner: JsonScanner) -> str:
    """A character as JSON has it, before the scanner takes it: a control character within a string is escaped."""
    return json.dumps(char)[1:-1] if char < " " and scanner.in_string else char
