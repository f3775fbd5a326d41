"""What crosses between an engine and its grammar workers: length-prefixed MessagePack over a socket pair."""

from __future__ import annotations

import struct

import msgspec

from llmc.runtime.grammar.spec import GrammarSpec

LENGTH = struct.Struct("<I")


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of every message; the tag is the class name."""


class Configure(_Message, frozen=True):
    """The first message to a worker."""

    tokenizer_json: bytes
    vocab_size: int  # width of the logits
    eos_token_ids: list[int]


class Compile(_Message, frozen=True):
    """Compile a grammar and keep it; answered by `Compiled`."""

    grammar: GrammarSpec


class MatchRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One sequence of a step: the tokens chosen since the worker last heard of it."""

    session: str
    token_ids: list[int]
    remaining: int  # tokens that may still come, the one of this step included
    grammar: GrammarSpec | None = None  # begins the session, with all of the sequence's output in token_ids


class Match(_Message, frozen=True):
    """Ask for the masks of a step; answered by `Masks` with one row per row."""

    step: int
    rows: list[MatchRow]


class Confirm(_Message, frozen=True):
    """May these tokens be chosen without losing the way to the end? One (session, token) each; answered by `Confirmed`."""

    step: int
    rows: list[tuple[str, int]]


class Forget(_Message, frozen=True):
    """Sessions that ended."""

    sessions: list[str]


class Ready(_Message, frozen=True):
    """The tokenizer is understood."""


class Compiled(_Message, frozen=True):
    """A grammar was compiled, or `error` says why not."""

    key: bytes
    error: str | None = None


class MaskRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tokens one sequence may choose from."""

    mask: bytes  # one bit per token id, the lowest id in the lowest bit of the first byte; b"" with an error
    error: str | None = None
    at_fault: bool = True  # with an error: the grammar is, not the worker
    way_out: int = -1  # with little room left: the token that leads to the document's end in time; others need `Confirm`


class Masks(_Message, frozen=True):
    step: int
    rows: list[MaskRow]


class Confirmed(_Message, frozen=True):
    step: int
    accepted: list[bool]


class Failed(_Message, frozen=True):
    """The worker cannot work at all; it ends."""

    message: str


ToWorker = Configure | Compile | Match | Confirm | Forget
FromWorker = Ready | Compiled | Masks | Confirmed | Failed


def packed(message: ToWorker | FromWorker) -> bytes:
    """A message as it goes over the wire."""
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body
