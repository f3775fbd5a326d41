"""The way to the end of a document: tokens that complete it soon, found by trying what closes things first.

With it a sequence never ends in the middle of a document that had room to end: while the way fits into the tokens left, a choice
that would lengthen it beyond them is replaced by the way's first token. The way is short, not the shortest: it is found greedily,
by the habits of JSON. Where none is found (a grammar whose end is far, or hidden from this habit), nothing is replaced.
"""

from __future__ import annotations

from typing import Any

_PREFERRED = '}],:0123456789"ntf{['
_LETTERS = "qzWk"  # where all of these may follow beside a quote, a string is open


class WayOut:
    """Finds ways to the end for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        def single(char: str) -> int | None:
            ids = tokenizer.tokenize_str(char)
            return ids[0] if len(ids) == 1 else None

        self._quote = single('"')
        self._letters = [token for token in map(single, _LETTERS) if token is not None]
        self._preferred = [token for token in map(single, _PREFERRED) if token is not None]

    def find(self, matcher: Any, most: int) -> list[int] | None:
        """Tokens after which the document may end, at most `most`; [] where it may end now; None: none found. Changes nothing."""
        if matcher.is_accepting():
            return []
        copy = matcher.deep_copy()
        way: list[int] = []
        while len(way) < most:
            forced = copy.compute_ff_tokens()
            tokens = forced or [self._choose(copy.compute_bitmask(), len(way))]
            if tokens[0] < 0 or not copy.consume_tokens(tokens):
                return None
            way += tokens
            if copy.is_accepting():
                return way if len(way) <= most else None
        return None

    def _choose(self, mask: bytes, num_before: int) -> int:
        """The token most likely to close something; -1 where none is allowed."""
        if self._quote is not None and _has(mask, self._quote) and all(_has(mask, letter) for letter in self._letters):
            return self._quote
        for token in self._preferred:
            if _has(mask, token):
                return token
        allowed = [byte * 8 + bit for byte, bits in enumerate(mask) if bits for bit in range(8) if bits >> bit & 1]
        return allowed[num_before % len(allowed)] if allowed else -1  # not always the first: it may lead in a circle


def _has(mask: bytes, token: int) -> bool:
    return bool(mask[token >> 3] >> (token & 7) & 1)
