"""Log-probabilities in the shapes of OpenAI's two APIs and of vLLM's prompt_logprobs."""

from __future__ import annotations

from typing import Any

import msgspec

from llmc.runtime.messages import TokenLogprobs
from llmc.runtime.text import Tokenizer

_LOWEST = -9999.0  # JSON has no minus infinity


class TokenNames:
    """How log-probabilities name a token: by its text, or with return_tokens_as_token_ids by its id."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def __call__(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_text(token_id)

    def chat_entry(self, token_id: int, value: float) -> dict[str, Any]:
        """One token of a chat answer's log-probabilities."""
        raw = self._tokenizer.token_bytes(token_id)
        name = f"token_id:{token_id}" if self._as_ids else raw.decode("utf-8", "replace")
        return {"token": name, "logprob": _finite(value), "bytes": list(raw)}

    def num_chars(self, token_id: int) -> int:
        return len(self._tokenizer.token_text(token_id))


def chat_logprobs(names: TokenNames, entries: list[TokenLogprobs]) -> dict[str, Any]:
    """`choices[].logprobs` of a chat answer."""
    return {
        "content": [
            {**names.chat_entry(e.token_id, e.logprob), "top_logprobs": [names.chat_entry(token_id, value) for token_id, value in e.top]}
            for e in entries
        ]
    }


def completion_logprobs(names: TokenNames, entries: list[TokenLogprobs | None], ids: list[int], offset: int) -> dict[str, Any]:
    """`choices[].logprobs` of a completion.

    Args:
        entries: one per token; None for a prompt's first token, which has none.
        ids: the tokens.
        offset: characters of the text before the first of them.
    """
    result: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, entry in zip(ids, entries, strict=True):
        result["tokens"].append(names(token_id))
        result["token_logprobs"].append(None if entry is None else _finite(entry.logprob))
        result["top_logprobs"].append(None if entry is None else _top_by_name(names, entry))
        result["text_offset"].append(offset)
        offset += names.num_chars(token_id)
    return result


def with_top(entries: list[TokenLogprobs | None], num_top: int) -> list[TokenLogprobs | None]:
    """The same with at most `num_top` top ones each; -1: with all."""
    return [e if e is None or num_top < 0 or len(e.top) <= num_top else msgspec.structs.replace(e, top=e.top[:num_top]) for e in entries]


def prompt_logprobs(tokenizer: Tokenizer, entries: list[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
    """vLLM's prompt_logprobs: per position, token id -> log-probability, rank and text."""
    return [None if entry is None else _ranked(tokenizer, entry) for entry in entries]


def _ranked(tokenizer: Tokenizer, entry: TokenLogprobs) -> dict[str, Any]:
    tokens = {token_id: (value, rank) for rank, (token_id, value) in enumerate(entry.top, start=1)}
    tokens[entry.token_id] = (entry.logprob, entry.rank)
    return {
        str(token_id): {"logprob": _finite(value), "rank": rank, "decoded_token": tokenizer.token_text(token_id)}
        for token_id, (value, rank) in tokens.items()
    }


def _top_by_name(names: TokenNames, entry: TokenLogprobs) -> dict[str, float]:
    top = {names(token_id): _finite(value) for token_id, value in reversed(entry.top)}
    top[names(entry.token_id)] = _finite(entry.logprob)
    return top


def _finite(value: float) -> float:
    return max(value, _LOWEST)
