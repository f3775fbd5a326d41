"""Token ids to text as they come, one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence

from llmc.runtime.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_NUM_PROMPT_TOKENS = 6  # enough for some that are no special tokens
_MAX_HELD_TOKENS = 32  # a character is at most 4 bytes; longer runs of broken bytes are real and are let go


class Detokenizer:
    """Gives the text that each new token makes certain; the pieces joined are the text of all ids decoded at once, or behind a prompt
    what the ids add to its text.

    `tokenizers.DecodeStream` does nearly this, but it raises on some byte-fallback sequences and has no way to give out
    what it still holds at the end, so the window is kept here: `_window` holds the ids since the last cut, the first
    `_num_context` of them already given out and kept because decoders treat a first token differently (a leading
    space). Text ending in U+FFFD is held: the next token may complete the character.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt: Sequence[int] = ()) -> None:
        """`prompt`: tokens that stand before, whose text is none of the pieces: a first token's leading space is text behind them."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window = list(prompt[-_NUM_PROMPT_TOKENS:])
        self._given = tokenizer.decode(self._window, skip_special_tokens) if self._window else ""  # text of the window given out so far
        if self._given.endswith(_REPLACEMENT):  # half a character, perhaps: the pieces are then those of the ids alone
            self._window, self._given = [], ""
        self._num_context = len(self._window)

    def push(self, ids: list[int]) -> str:
        """Add new token ids; returns the text that is now certain, often empty. Changes the state."""
        if not ids:
            return ""
        self._window.extend(ids)
        text = self._tokenizer.decode(self._window, self._skip_special_tokens)
        certain = text.rstrip(_REPLACEMENT)
        if len(certain) == len(text) or len(self._window) - self._num_context > _MAX_HELD_TOKENS:
            delta = text[len(self._given) :]
            self._cut(text)
            return delta
        delta = certain[len(self._given) :]
        if delta:
            self._given = certain
        return delta

    def flush(self) -> str:
        """Give out what is still held, a broken last character as U+FFFD. The detokenizer is at its end afterwards."""
        text = self._tokenizer.decode(self._window, self._skip_special_tokens)
        delta = text[len(self._given) :]
        self._window, self._num_context, self._given = [], 0, ""
        return delta

    def _cut(self, text: str) -> None:
        """Start a new window whose context is the ids given out last."""
        recent = self._window[self._num_context :]
        context_text = self._tokenizer.decode(recent, self._skip_special_tokens)
        if not context_text:
            # Skipped special tokens are no context for the next token: keep the older ids, up to a bound.
            self._given = text
            if len(self._window) <= _MAX_HELD_TOKENS:
                self._num_context = len(self._window)
                return
            recent = self._window[-_MAX_HELD_TOKENS // 2 :]
            context_text = self._tokenizer.decode(recent, self._skip_special_tokens)
        self._window, self._num_context, self._given = list(recent), len(recent), context_text
