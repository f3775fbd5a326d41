"""One sequence's text: detokenizer and stop strings joined, with `min_tokens` respected."""

from __future__ import annotations

from collections.abc import Sequence

from llmc.runtime.text.detokenizer import Detokenizer
from llmc.runtime.text.stop import StopMatcher
from llmc.runtime.text.tokenizer import Tokenizer


class TextStream:
    """Turns one sequence's new token ids into text to show.

    Stop strings are looked for only in the text of tokens after the first `min_tokens`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: list[str] | None = None,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        shown_special: dict[int, str] | None = None,
        prompt: Sequence[int] = (),
    ) -> None:
        """`shown_special`: special tokens (id -> text) that are text although the others are skipped. `prompt`: what stands before."""
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens, prompt)
        self._shown_special = (shown_special or {}) if skip_special_tokens else {}
        self._matcher = StopMatcher(stop or [], include_stop)
        self._min_tokens = min_tokens
        self.include_stop = include_stop
        self.num_tokens = 0
        self.matched_stop: str | None = None

    def push(self, ids: list[int], *, last: bool = False) -> str:
        """Add token ids; returns the text to show. `last` gives out what is still held.

        When a stop string completes, `matched_stop` is set, the returned text ends there, and later text is ignored.
        Ids are taken one by one, so the result does not depend on how many come at once.
        """
        shown: list[str] = []
        for token_id in ids:
            if self.matched_stop is not None:
                break
            self.num_tokens += 1
            marker = self._shown_special.get(token_id)
            text = self._detokenizer.push([token_id]) if marker is None else self._detokenizer.flush() + marker
            self._show(text, shown)
        if last and self.matched_stop is None:
            self._show(self._detokenizer.flush(), shown)
            shown.append(self._matcher.flush())
        return "".join(shown)

    def _show(self, text: str, shown: list[str]) -> None:
        if not text or self.matched_stop is not None:
            return
        if self.num_tokens <= self._min_tokens:
            shown.append(text)
            return
        piece, self.matched_stop = self._matcher.push(text)
        shown.append(piece)
