"""What a structured request asks for, as one bounded text. Compiles nothing and imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

import msgspec

from llmc.errors import RequestRejected
from llmc.runtime.messages import StructuredOutputsParams

MAX_GRAMMAR_BYTES = 128 * 1024
MAX_GRAMMAR_DEPTH = 64  # brackets open at once; the parsers of grammars and of regular expressions recurse
MAX_CHOICES = 4096
_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")

Kind = Literal["json", "regex", "choice", "grammar"]
FIELD = "structured_outputs"  # of the request
_ANY_OBJECT = '{"type":"object"}'


class GrammarSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A grammar as text: a JSON schema, a regular expression, a JSON list of choices, or a Lark or GBNF grammar."""

    kind: Kind
    text: str

    @property
    def key(self) -> bytes:
        """Names equal grammars."""
        return hashlib.blake2b(f"{self.kind}:{self.text}".encode(), digest_size=16).digest()


def grammar_of(params: StructuredOutputsParams) -> GrammarSpec:
    """The one grammar `params` names.

    Raises:
        RequestRejected: none or several are named, or it is too large or too deep.
    """
    named = [name for name in ("json", "json_object", "regex", "choice", "grammar") if getattr(params, name) not in (None, False)]
    if len(named) != 1:
        found = ", ".join(named) or "none"
        raise _rejected(f"must name exactly one of json, json_object, regex, choice and grammar; found {found}")
    spec = _spec(params)
    if len(spec.text) > MAX_GRAMMAR_BYTES or len(spec.text.encode("utf-8", "replace")) > MAX_GRAMMAR_BYTES:
        raise _rejected(f"has a {spec.kind} larger than the {MAX_GRAMMAR_BYTES} bytes that are accepted")
    if spec.kind != "choice":
        _check_depth(spec)
    return spec


def _spec(params: StructuredOutputsParams) -> GrammarSpec:
    if params.json_object:
        return GrammarSpec(kind="json", text=_ANY_OBJECT)
    if params.json is not None:
        return GrammarSpec(kind="json", text=params.json if isinstance(params.json, str) else _dumped(params.json))
    if params.choice is not None:
        if not params.choice or not all(params.choice):
            raise _rejected("needs at least one choice, and none of them empty")
        if len(params.choice) > MAX_CHOICES:
            raise _rejected(f"has {len(params.choice)} choices; at most {MAX_CHOICES} are accepted")
        return GrammarSpec(kind="choice", text=_dumped(params.choice))
    if params.regex is not None:
        return GrammarSpec(kind="regex", text=params.regex)
    assert params.grammar is not None
    return GrammarSpec(kind="grammar", text=params.grammar)


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False)  # in the client's order: it is the order of properties
    except (TypeError, ValueError, RecursionError) as error:
        raise _rejected("has a json that cannot be written as JSON") from error


def _check_depth(spec: GrammarSpec) -> None:
    """Bound nesting by counting brackets. In a text where brackets stand for themselves this may count too many, never too few."""
    depth = 0
    escaped = quoted = False
    for char in spec.text:
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == '"' and spec.kind == "json":
            quoted = not quoted
        elif quoted:
            continue
        elif char in _OPENING:
            depth += 1
            if depth > MAX_GRAMMAR_DEPTH:
                raise _rejected(f"has a {spec.kind} nested deeper than the {MAX_GRAMMAR_DEPTH} levels that are accepted")
        elif char in _CLOSING:
            depth = max(0, depth - 1)


def _rejected(rest: str) -> RequestRejected:
    return RequestRejected(f"structured output {rest}", param=FIELD, code="invalid_grammar")
