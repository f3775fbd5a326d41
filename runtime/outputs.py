"""What `llmc.LLM` returns, named as vLLM's users know it."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.runtime.messages import FinishReason, TokenLogprobs
from llmc.runtime.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """Log-probability of one token at one position, from the logits before any sampling modification."""

    logprob: float
    rank: int  # 1 = most likely
    decoded_token: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One generated sequence."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None  # per token: its own, and the top ones asked for
    finish_reason: FinishReason
    stop_reason: int | str | None  # the stop token or stop string that ended it; None for eos and length
    error: str | None = None  # with finish_reason "error": why


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """Everything generated for one prompt."""

    request_id: str
    prompt: str | None  # None when token ids were given
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    num_cached_tokens: int
    finished: bool = True


def logprob_table(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """One position's log-probabilities by token id, the token that was there first."""

    def shown(token_id: int) -> str | None:
        return tokenizer.token_text(token_id) if tokenizer is not None else None

    table = {entry.token_id: Logprob(logprob=entry.logprob, rank=entry.rank, decoded_token=shown(entry.token_id))}
    for place, (token_id, logprob) in enumerate(entry.top, start=1):
        if token_id not in table:
            table[token_id] = Logprob(logprob=logprob, rank=place, decoded_token=shown(token_id))
    return table
