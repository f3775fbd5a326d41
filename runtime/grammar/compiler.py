"""Grammars by llguidance, with limits on what they may cost. Imported by the worker process alone."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from llmc.runtime.grammar.closing import LONGEST_WAY, NearestChoice, WayOut
from llmc.runtime.grammar.spec import GrammarSpec

_MAX_KEPT = 64  # compiled grammars
_MAX_REASON_CHARS = 200
# A model that has lost its way writes spaces without end; indentation of 16 levels fits.
_JSON_OPTIONS: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}
_LONG_QUOTE = re.compile(r'"[^"]{40,}"?')


FindWay = Callable[[llguidance.LLMatcher, list[int], int], list[int] | None]  # (matcher, tokens it has taken, most) -> way to the end


class GrammarError(Exception):
    """A grammar cannot be used; the text is the reason."""


class Compiled(NamedTuple):
    """A grammar ready for a sequence."""

    matcher: llguidance.LLMatcher  # at the start, the sequence's own
    way: list[int] | None  # to the end, as `closing` finds it
    find: FindWay


class Compiler:
    """Compiles grammars for one tokenizer and keeps the latest. `compiled` is for one thread, `kept` for any.

    Args:
        tokenizer_json: bytes of a tokenizer.json.
        vocab_size: width of the logits.
        eos_token_ids: allowed where a document may end.

    Raises:
        GrammarError: the tokenizer cannot be used.
    """

    def __init__(self, tokenizer_json: bytes, vocab_size: int, eos_token_ids: list[int]) -> None:
        if not tokenizer_json.lstrip().startswith(b"{"):  # llguidance would take it for the name of one to download
            raise GrammarError("the artifact's tokenizer.json is not a JSON object")
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        try:
            self.tokenizer = llguidance.LLTokenizer(tokenizer_json.decode(), n_vocab=vocab_size, eos_token=eos_token_ids)
        except Exception as error:  # a bare Exception from Rust
            raise GrammarError(f"structured output does not know this model's kind of tokenizer ({short_reason(str(error))})") from error
        # Beyond these a grammar is refused, or its sequence ends with an error; measured so that no mask takes longer than 0.3 s.
        self._limits = llguidance.LLParserLimits(
            initial_lexer_fuel=500_000,
            step_lexer_fuel=50_000,
            max_lexer_states=20_000,
            max_grammar_size=200_000,
            verbose_errors=False,
        )
        self._ways_out = WayOut(self.tokenizer)
        self._kept: OrderedDict[bytes, Compiled] = OrderedDict()
        self._lock = threading.Lock()  # of _kept

    def kept(self, spec: GrammarSpec) -> Compiled | None:
        """A grammar compiled before, if it is still here."""
        key = spec.key
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            self._kept.move_to_end(key)
        return found._replace(matcher=found.matcher.deep_copy())

    def compiled(self, spec: GrammarSpec) -> Compiled:
        """A grammar, compiled now or before.

        Raises:
            GrammarError: it does not compile, or not within the limits.
        """
        found = self.kept(spec)
        if found is not None:
            return found
        matcher = self._compile(spec)
        way, find = self._finder(matcher, spec)
        made = Compiled(matcher=matcher, way=way, find=find)
        with self._lock:
            self._kept[spec.key] = made
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        return made._replace(matcher=matcher.deep_copy())

    def _finder(self, matcher: llguidance.LLMatcher, spec: GrammarSpec) -> tuple[list[int] | None, FindWay]:
        """A way to the end from the start, and what finds it from elsewhere."""
        if spec.kind == "choice":
            nearest = NearestChoice(self.tokenizer, json.loads(spec.text))
            return nearest.find(matcher, [], LONGEST_WAY), nearest.find
        by_habit = self._ways_out.find(matcher, LONGEST_WAY, look=False)
        way = by_habit if by_habit is not None else self._ways_out.find(matcher, LONGEST_WAY, look=True)
        look = by_habit is None and way is not None

        def find(matcher: llguidance.LLMatcher, _said: list[int], most: int) -> list[int] | None:
            return self._ways_out.find(matcher, most, look=look)

        return way, find

    def _compile(self, spec: GrammarSpec) -> llguidance.LLMatcher:
        try:
            matcher = llguidance.LLMatcher(self.tokenizer, _source(spec), limits=self._limits, log_level=0)
        except Exception as error:
            raise GrammarError(short_reason(str(error))) from error
        # The first mask builds the lexer: its cost belongs here, and so do its limits.
        matcher.compute_bitmask()
        if matcher.is_error():
            raise GrammarError(short_reason(matcher.get_error()))
        return matcher


def _source(spec: GrammarSpec) -> str:
    """The grammar in llguidance's form."""
    if spec.kind == "json":
        return llguidance.LLMatcher.grammar_from_json_schema(spec.text, defaults=_JSON_OPTIONS)
    if spec.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(spec.text)
    if spec.kind == "choice":
        return llguidance.grammar_from("choice", spec.text)
    return llguidance.LLMatcher.grammar_from_lark(any_to_lark(spec.text))


def short_reason(text: str) -> str:
    """The first line of an error and what it points at, short and printable; long quotes of the client's input are left out."""
    lines = text.strip().splitlines() or ["no reason was given"]
    pointed_at = [line.removeprefix("error:") for line in lines[1:] if line.startswith("error:")]  # under a drawing of the place
    line = "".join(_LONG_QUOTE.sub('"..."', line) for line in [lines[0], *pointed_at[:1]])
    line = "".join(char if char.isprintable() else " " for char in line)
    return line if len(line) <= _MAX_REASON_CHARS else line[: _MAX_REASON_CHARS - 3] + "..."
