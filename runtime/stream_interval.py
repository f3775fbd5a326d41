"""Tokens of a sequence held back until some have come together: fewer messages and chunks, the same tokens (`--stream-interval`)."""

from __future__ import annotations

import msgspec

from llmc.runtime.messages import EngineEvent, GenerateRequest, TokenEvent


class StreamInterval:
    """Lies between the engine and its socket. A sequence's first token and its end are passed on at once.

    Sequences with stop strings are passed on token by token: the text side ends them, and a later look would cost steps.

    Args:
        tokens: how many make a message; 1 changes nothing.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._held: dict[str, list[TokenEvent]] = {}  # of sequences whose first token is out
        self._at_once: set[str] = set()  # have stop strings

    def begin(self, request: GenerateRequest) -> None:
        """Note a sequence that the engine took."""
        if self._tokens > 1 and request.sampling.stop:
            self._at_once.add(request.request_id)

    def pass_on(self, events: list[EngineEvent]) -> list[EngineEvent]:
        """What is to be sent now, of `events` and of what was held."""
        if self._tokens == 1:
            return events
        out: list[EngineEvent] = []
        for event in events:
            if isinstance(event, TokenEvent):
                out += self._of_sequence(event)
            else:
                out.append(event)
        return out

    def _of_sequence(self, event: TokenEvent) -> list[TokenEvent]:
        name = event.request_id
        held = self._held.get(name)
        if event.finish_reason is not None:
            self._held.pop(name, None)
            self._at_once.discard(name)
            if event.finish_reason in ("abort", "error"):
                return [*([_joined(held)] if held else []), event]
            return [_joined([*(held or []), event])]
        if name in self._at_once:
            return [event]
        if held is None:
            self._held[name] = []
            return [event]
        held.append(event)
        if sum(len(one.token_ids) for one in held) < self._tokens:
            return []
        self._held[name] = []
        return [_joined(held)]


def _joined(events: list[TokenEvent]) -> TokenEvent:
    """One event for several of a sequence; the last says how it ends."""
    if len(events) == 1:
        return events[0]
    logprobs = [entry for event in events for entry in event.logprobs or []]
    return msgspec.structs.replace(
        events[-1],
        token_ids=[token for event in events for token in event.token_ids],
        logprobs=logprobs if events[-1].logprobs is not None else None,
        prompt_logprobs=events[0].prompt_logprobs,
        num_cached_tokens=events[0].num_cached_tokens,
        scheduled_at=events[0].scheduled_at,
    )
