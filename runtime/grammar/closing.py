"""The way to the end of a document: tokens that complete it soon, found by trying what closes things first.

With it a sequence never ends in the middle of a document that had room to end: while the way fits into the tokens left, a choice
that would lengthen it beyond them is replaced by the way's first token. The way is short, not the shortest: it is found greedily,
first by the habits of JSON, then by trying at each place whether one character leads to the end. Where none is found (an end that
is far, or well hidden), nothing is replaced.
"""

from __future__ import annotations

import heapq
from typing import Any

LONGEST_WAY = 512  # tokens
_LONGEST_LOOK = 48  # tokens of a way on which each character is tried
_PREFERRED = '}],:0123456789"ntf{['
_LETTERS = "qzWk"  # where all of these may follow beside a quote, a string is open
_MOST_CHOICES = 64  # looked at to find a near one


class WayOut:
    """Finds ways to the end for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        def single(char: str) -> int | None:
            ids = tokenizer.tokenize_str(char)
            return ids[0] if len(ids) == 1 else None

        self._quote = single('"')
        self._letters = [token for token in map(single, _LETTERS) if token is not None]
        self._preferred = [token for token in map(single, _PREFERRED) if token is not None]
        self._characters = [token for token in map(single, ["\n", *map(chr, range(32, 127))]) if token is not None]

    def find(self, matcher: Any, most: int, *, look: bool) -> list[int] | None:
        """A way to the end. Changes nothing.

        Args:
            most: tokens it may have.
            look: at each place, try first whether one character leads to the end; slow, and needed where habit alone does not end.

        Returns:
            Tokens after which the document may end; [] where it may end now; None: none found.
        """
        if matcher.is_accepting():
            return []
        matcher = matcher.deep_copy()
        most = min(most, _LONGEST_LOOK) if look else most
        way: list[int] = []
        while len(way) < most:
            tokens = matcher.compute_ff_tokens()
            if not tokens:
                mask = matcher.compute_bitmask()
                ending = self._ending(matcher, mask) if look else None
                if ending is not None:
                    return way + ending if len(way) + len(ending) <= most else None
                tokens = [self._choose(mask, len(way))]
            if tokens[0] < 0 or not matcher.consume_tokens(tokens):
                return None
            way += tokens
            if matcher.is_accepting():
                return way if len(way) <= most else None
        return None

    def _ending(self, matcher: Any, mask: bytes) -> list[int] | None:
        """One character, and what must follow it, after which the document may end. Leaves `matcher` where it was."""
        for token in self._characters:
            if not _has(mask, token):
                continue
            matcher.consume_token(token)
            forced = [] if matcher.is_accepting() else matcher.compute_ff_tokens()
            matcher.consume_tokens(forced)
            ended = matcher.is_accepting()
            matcher.rollback(1 + len(forced))
            if ended:
                return [token, *forced]
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


class NearestChoice:
    """Finds ways to the end where the output is one of a list of texts: the rest of the one with the least to say.

    Args:
        choices: the texts.
    """

    def __init__(self, tokenizer: Any, choices: list[str]) -> None:
        self._tokenizer = tokenizer
        self._choices = [choice.encode() for choice in choices]

    def find(self, matcher: Any, said: list[int], most: int) -> list[int] | None:
        """A way to the end, as `WayOut.find` gives it. `said`: the tokens that `matcher` has taken."""
        before = self._tokenizer.decode_bytes(said)
        rests = [choice[len(before) :] for choice in self._choices if choice.startswith(before)]
        ways = [self._tokenizer.tokenize_bytes(rest) for rest in heapq.nsmallest(_MOST_CHOICES, rests, key=len)]
        ways = [way for way in ways if len(way) <= most and matcher.validate_tokens(way) == len(way)]
        return min(ways, key=len, default=None)


def _has(mask: bytes, token: int) -> bool:
    return bool(mask[token >> 3] >> (token & 7) & 1)
