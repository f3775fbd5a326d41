"""The parts of a reply: reasoning, content, tool calls; as pieces while it comes, as a whole at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

PieceKind = Literal["content", "reasoning", "call", "arguments", "broken"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a reply that is now certain.

    kind "call": a call of the tool `text` begins. "arguments": more of its arguments, which are JSON. "broken": the call
    cannot be read after all; `text` is everything it was written as, and is content.
    """

    kind: PieceKind
    text: str
    call: int = -1  # which call of this reply, from 0; -1 for the other kinds


class ReplyParser(Protocol):
    """Takes a reply's text as it comes. No text makes it raise; its pieces joined do not depend on how the text was cut."""

    def push(self, text: str) -> list[Piece]:
        """Add text; returns what it made certain."""

    def finish(self, *, cut: bool) -> list[Piece]:
        """The reply is over; `cut`: it was cut off, so half a tag at its end is no text."""


@dataclass(slots=True)
class Call:
    """One tool call."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class Reply:
    """A whole reply, put together from its pieces."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, Call] = field(default_factory=dict)

    def add(self, pieces: list[Piece]) -> None:
        """Take pieces in. Changes this object."""
        for piece in pieces:
            if piece.kind == "reasoning":
                self.reasoning.append(piece.text)
            elif piece.kind == "call":
                self.calls[piece.call] = Call(piece.text)
            elif piece.kind == "arguments":
                self.calls[piece.call].arguments += piece.text
            else:
                self.calls.pop(piece.call, None)
                self.content.append(piece.text)


class TrimmedText:
    """Text without the white space at its start, and with that at its end held until more text follows."""

    def __init__(self, *, start: bool, end: bool) -> None:
        """`start`, `end`: whether that side is trimmed."""
        self._started = not start
        self._hold = end
        self._held = ""

    @property
    def empty(self) -> bool:
        """Whether only white space came so far."""
        return not self._started

    def push(self, text: str) -> str:
        """Add text; returns what can be shown."""
        text = self._held + text
        self._held = ""
        if not self._started:
            text = text.lstrip()
            self._started = bool(text)
        if not self._hold:
            return text
        shown = text.rstrip()
        self._held = text[len(shown) :]
        return shown

    def finish(self) -> str:
        """What is held; nothing follows that it would have been trimmed before."""
        held, self._held = self._held, ""
        return held if self._started else ""


def find_marker(text: str, markers: tuple[str, ...]) -> tuple[int, str | None]:
    """(start, marker) of the first marker in `text`; without one, (start of what may become one at its end, None)."""
    first, found = len(text), None
    for marker in markers:
        at = text.find(marker)
        if 0 <= at < first:
            first, found = at, marker
    if found is not None:
        return first, found
    longest = max(map(len, markers), default=1) - 1
    for at in range(max(0, len(text) - longest), len(text)):
        if any(marker.startswith(text[at:]) for marker in markers):
            return at, None
    return len(text), None
