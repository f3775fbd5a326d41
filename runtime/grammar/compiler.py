"""Grammars by llguidance, with limits on what they may cost. Imported by the worker process alone."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from llmc.runtime.grammar.spec import GrammarSpec

_MAX_KEPT = 64  # compiled grammars
_MAX_REASON_CHARS = 200
# A model that has lost its way writes spaces without end; indentation of 16 levels fits.
_JSON_OPTIONS: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}
_LONG_QUOTE = re.compile(r'"[^"]{40,}"?')


class GrammarError(Exception):
    """A grammar cannot be used; the text is the reason."""


class Compiler:
    """Compiles grammars for one tokenizer and keeps the latest. `matcher` is for one thread, `kept` for any.

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
        self._kept: OrderedDict[bytes, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()  # of _kept

    def kept(self, spec: GrammarSpec) -> llguidance.LLMatcher | None:
        """A fresh matcher of a grammar compiled before, if it is still here."""
        key = spec.key
        with self._lock:
            matcher = self._kept.get(key)
            if matcher is not None:
                self._kept.move_to_end(key)
        return matcher.deep_copy() if matcher is not None else None

    def matcher(self, spec: GrammarSpec) -> llguidance.LLMatcher:
        """A fresh matcher at the start of `spec`, compiled or copied.

        Raises:
            GrammarError: it does not compile, or not within the limits.
        """
        found = self.kept(spec)
        if found is not None:
            return found
        matcher = self._compile(spec)
        with self._lock:
            self._kept[spec.key] = matcher
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        return matcher.deep_copy()

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
    """The first line of an error, short and printable; long quotes of the client's input are left out."""
    line = text.strip().splitlines()[0] if text.strip() else "no reason was given"
    line = "".join(char if char.isprintable() else " " for char in _LONG_QUOTE.sub('"..."', line))
    return line if len(line) <= _MAX_REASON_CHARS else line[: _MAX_REASON_CHARS - 3] + "..."
