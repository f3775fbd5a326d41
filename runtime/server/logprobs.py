"""Log-probabilities in the shapes of OpenAI's two APIs and of vLLM's prompt_logprobs."""

from __future__ import annotations

from typing import Any

from llmc.runtime.messages import TokenLogprobs
from llmc.runtime.text import Tokenizer

_LOWEST = -9999.0  # JSON has no minus infinity


def chat_logprobs(tokenizer: Tokenizer, entries: list[TokenLogprobs]) -> dict[str, Any]:
    """`choices[].logprobs` of a chat answer."""
    return {"content": [{**_chat_token(tokenizer, e.token_id, e.logprob), "top_logprobs": _chat_top(tokenizer, e)} for e in entries]}


def completion_logprobs(tokenizer: Tokenizer, entries: list[TokenLogprobs | None], ids: list[int], offset: int) -> dict[str, Any]:
    """`choices[].logprobs` of a completion.

    Args:
        entries: one per token; None for a prompt's first token, which has none.
        ids: the tokens.
        offset: characters of the text before the first of them.
    """
    result: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, entry in zip(ids, entries, strict=True):
        text = tokenizer.token_text(token_id)
        result["tokens"].append(text)
        result["token_logprobs"].append(None if entry is None else _finite(entry.logprob))
        result["top_logprobs"].append(None if entry is None else _top_by_text(tokenizer, entry))
        result["text_offset"].append(offset)
        offset += len(text)
    return result


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


def _top_by_text(tokenizer: Tokenizer, entry: TokenLogprobs) -> dict[str, float]:
    top = {tokenizer.token_text(token_id): _finite(value) for token_id, value in reversed(entry.top)}
    top[tokenizer.token_text(entry.token_id)] = _finite(entry.logprob)
    return top


def _chat_top(tokenizer: Tokenizer, entry: TokenLogprobs) -> list[dict[str, Any]]:
    return [_chat_token(tokenizer, token_id, value) for token_id, value in entry.top]


def _chat_token(tokenizer: Tokenizer, token_id: int, value: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(value), "bytes": list(raw)}


def _finite(value: float) -> float:
    return max(value, _LOWEST)
