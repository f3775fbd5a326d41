"""Stop strings: end the text where one appears, and never show a part of one."""

from __future__ import annotations


class StopMatcher:
    """Finds the first stop string in text that comes in pieces. The result does not depend on how the text is cut.

    The match that is complete first wins; of two that end at the same character, the longer. Text that may be the
    beginning of a stop string is held back until the next characters decide.

    Source: Knuth, Morris, Pratt, "Fast pattern matching in strings", SIAM J. Comput. 6(2), 1977; one automaton per
    string, so each character costs a constant however long the strings are.
    """

    def __init__(self, stops: list[str] | tuple[str, ...], include: bool = False) -> None:
        """`include`: the matched stop string stays in the text (include_stop_str_in_output)."""
        if any(not stop for stop in stops):
            raise ValueError("a stop string must hold at least one character")
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)  # characters of each stop matched by the end of the text so far
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Add text; returns (text to show, the stop string found or None). After a match nothing more is to be pushed."""
        if not self._stops:
            return text, None
        buffer = self._held + text
        for index, char in enumerate(text, start=len(self._held)):
            matched = self._advance(char)
            if matched is not None:
                end = index + 1
                self._held = ""
                return buffer[: end if self._include else end - len(matched)], matched
        keep = len(buffer) - max(self._states)
        self._held = buffer[keep:]
        return buffer[:keep], None

    def flush(self) -> str:
        """Give out what is held; the text is over, so it was no stop string."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> str | None:
        """Move every automaton by one character; returns the longest stop that is now complete."""
        for i, stop in enumerate(self._stops):
            state = self._states[i]
            while state and stop[state] != char:
                state = self._failures[i][state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                return stop
            self._states[i] = state
        return None


def _failure_table(pattern: str) -> list[int]:
    """For each prefix of `pattern`, the length of its longest proper suffix that is also a prefix."""
    table = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = table[length - 1]
        if pattern[i] == pattern[length]:
            length += 1
        table[i] = length
    return table
