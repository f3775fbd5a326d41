"""One sequence in the worker: where its document stands, which tokens may come, and how it can still end in time.

Everything here follows from the grammar, the tokens and the room left, so that a sequence told anew to another worker goes on as it
would have gone on in the first.
"""

from __future__ import annotations

from llmc.runtime.grammar.closing import LONGEST_WAY
from llmc.runtime.grammar.compiler import Compiled, Compiler, GrammarError

_LOOK_EVERY = 64  # tokens between two looks at how long the way to the end is, while there is plenty of room


class Session:
    """A document in the making.

    Args:
        grammar: its matcher is this session's own from here on.
        compiler: for the end tokens.
    """

    def __init__(self, grammar: Compiled, compiler: Compiler) -> None:
        self._matcher = grammar.matcher
        self._eos_token_ids = compiler.eos_token_ids
        self._find = grammar.find
        self._said: list[int] = []
        self._way = grammar.way  # tokens that complete the document from here; None: not known
        self._usual = len(self._way or [])  # how long such a way was when last looked at
        self._trial: tuple[int, list[int]] | None = None  # a token confirmed, and the way behind it
        self._watching = False
        self._remaining = 0

    def replay(self, token_ids: list[int], remaining: int) -> None:
        """Follow tokens chosen before; `remaining` are left after them.

        Raises:
            GrammarError: one does not fit.
        """
        for index, token in enumerate(token_ids):
            if self.watch(remaining + len(token_ids) - index) not in (-1, token):
                self.confirm(token)
            self.consume(token)

    def consume(self, token: int) -> None:
        """Go on by a token that was chosen.

        Raises:
            GrammarError: it does not fit, or the grammar's limits are reached.
        """
        if not self._matcher.consume_token(token):
            raise GrammarError(self._matcher.get_error() or "a token does not fit")
        self._said.append(token)
        trial, self._trial = self._trial, None
        if trial is not None and trial[0] == token:
            self._way = trial[1]
        else:
            self._way = self._way[1:] if self._way and self._way[0] == token else None

    def mask(self) -> bytes:
        """The tokens that may come, one bit each.

        Raises:
            GrammarError: the grammar's limits are reached.
        """
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise GrammarError(self._matcher.get_error())
        return mask

    def watch(self, remaining: int) -> int:
        """With so little room left that the choice of this step matters: the token that leads to the end in time. Otherwise -1.

        Args:
            remaining: tokens that may still come, this step's included.
        """
        self._remaining = remaining
        close = remaining <= 2 * self._usual + 32
        if not close and remaining % _LOOK_EVERY:
            return -1
        if self._way is None:
            self._way = self._find(self._matcher, self._said, min(remaining, LONGEST_WAY))
        if self._way is None:
            return -1
        self._usual = len(self._way)
        if remaining > 2 * self._usual + 32 or self._usual > remaining:
            return -1
        return self._way[0] if self._way else self._eos_token_ids[0]

    def confirm(self, token: int) -> bool:
        """Whether the document can still end in time after `token`, which its mask allows. Follows `watch`."""
        if token in self._eos_token_ids:
            return True
        room = self._remaining - 2  # without this token, and with one for the end token: a whole document should say "stop"
        way = self._way_behind(token, room)
        self._trial = (token, way) if way is not None else None
        return way is not None

    def _way_behind(self, token: int, room: int) -> list[int] | None:
        """The way to the end after `token`, of at most `room` tokens; a step along the present way is always one."""
        way = self._way
        if way and way[0] == token:
            return way[1:]
        if way is not None and len(way) <= room:
            tried = [token, *way, self._eos_token_ids[0]]
            if self._matcher.validate_tokens(tried) == len(tried):
                return way  # still the way, as inside a string
        after = self._matcher.deep_copy()
        return self._find(after, [*self._said, token], min(room, LONGEST_WAY)) if room >= 0 and after.consume_token(token) else None
