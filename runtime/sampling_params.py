"""One place that decides whether sampling parameters can run. Nothing behind it checks them again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sized

import msgspec

from llmc.errors import RequestRejected
from llmc.runtime.messages import SamplingParams

MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_TOKENS = 64
MAX_SEED = 2**63 - 1


def check_token_ids(token_ids: Iterable[int], *, vocab_size: int, param: str) -> None:
    """Refuse ids outside [0, vocab_size), where vocab_size is the width of the logits, not the tokenizer's length.

    Raises:
        RequestRejected: naming `param` and the first id that does not fit.
    """
    for token in token_ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise _rejected(param, f"holds {_shown(token)}; token ids are integers from 0 to {vocab_size - 1}")


def check(params: SamplingParams, *, vocab_size: int, max_logprobs: int, max_model_len: int) -> None:
    """Refuse what the sampler or the scheduler could not carry out.

    Args:
        params: as the client gave them, defaults filled in.
        vocab_size: width of the logits.
        max_logprobs: most top log-probabilities a request may ask for; -1 for the whole vocabulary.
        max_model_len: tokens of prompt and output together.

    Raises:
        RequestRejected: naming the parameter, what was given and what is accepted.
    """
    _integer("n", params.n, 1, MAX_N)
    _number("temperature", params.temperature, 0.0, 1e6)
    _number("top_p", params.top_p, 0.0, 1.0, above_low=True)
    _integer("top_k", params.top_k, -1, 2**31 - 1)
    _number("min_p", params.min_p, 0.0, 1.0)
    _number("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _number("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    _number("repetition_penalty", params.repetition_penalty, 0.0, 1e3, above_low=True)
    if params.seed is not None:
        _integer("seed", params.seed, -MAX_SEED - 1, MAX_SEED)
    if params.max_tokens is not None:
        _integer("max_tokens", params.max_tokens, 1, max_model_len)
    _integer("min_tokens", params.min_tokens, 0, params.max_tokens if params.max_tokens is not None else max_model_len)
    _check_logprobs(params, vocab_size, max_logprobs)
    _check_stop(params, vocab_size)
    _check_masks(params, vocab_size)
    if params.structured_outputs is not None:
        _check_structured(params)


def one_of_n(params: SamplingParams, choice: int) -> SamplingParams:
    """The parameters of sequence `choice` of a request with n of them: its own draws, and prompt log-probabilities with the first only."""
    seed = params.seed if params.seed is None else (params.seed + choice + 2**63) % 2**64 - 2**63  # kept within 64 bits
    return msgspec.structs.replace(params, n=1, seed=seed, prompt_logprobs=params.prompt_logprobs if choice == 0 else None)


def _check_logprobs(params: SamplingParams, vocab_size: int, max_logprobs: int) -> None:
    most = vocab_size if max_logprobs < 0 else max_logprobs
    for name, value in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if value is not None:
            _integer(name, value, 0, most)


def _check_structured(params: SamplingParams) -> None:
    from llmc.runtime.grammar.spec import grammar_of  # most requests have none

    assert params.structured_outputs is not None
    grammar_of(params.structured_outputs)
    if params.ignore_eos:
        raise _rejected("ignore_eos", "cannot be combined with structured output, whose document ends with an end token")


def _check_stop(params: SamplingParams, vocab_size: int) -> None:
    if params.stop is not None:
        _length("stop", params.stop, MAX_STOP_STRINGS)
        for text in params.stop:
            if not text or len(text) > MAX_STOP_CHARS:
                raise _rejected("stop", f"holds a string of {len(text)} characters; 1 to {MAX_STOP_CHARS} are accepted")
        if params.stop and not params.detokenize:
            raise _rejected("stop", "needs text, but detokenize is false; use stop_token_ids or leave detokenize on")
    if params.stop_token_ids is not None:
        _length("stop_token_ids", params.stop_token_ids, MAX_STOP_TOKEN_IDS)
        check_token_ids(params.stop_token_ids, vocab_size=vocab_size, param="stop_token_ids")


def _check_masks(params: SamplingParams, vocab_size: int) -> None:
    if params.logit_bias is not None:
        _length("logit_bias", params.logit_bias, vocab_size)
        check_token_ids(params.logit_bias, vocab_size=vocab_size, param="logit_bias")
        for value in params.logit_bias.values():
            _number("logit_bias", value, -100.0, 100.0)
    if params.allowed_token_ids is not None:
        if not params.allowed_token_ids:
            raise _rejected("allowed_token_ids", "is empty, which leaves no token to choose; leave it out to allow all")
        _length("allowed_token_ids", params.allowed_token_ids, vocab_size)
        check_token_ids(params.allowed_token_ids, vocab_size=vocab_size, param="allowed_token_ids")
    if params.bad_words_token_ids is not None:
        _length("bad_words", params.bad_words_token_ids, MAX_BAD_WORDS)
        for word in params.bad_words_token_ids:
            if not word:
                raise _rejected("bad_words", "holds an empty word")
            _length("bad_words", word, MAX_BAD_WORD_TOKENS)
            check_token_ids(word, vocab_size=vocab_size, param="bad_words")


def _integer(name: str, value: int, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise _rejected(name, f"is {_shown(value)}; an integer from {low} to {high} is expected")


def _number(name: str, value: float, low: float, high: float, *, above_low: bool = False) -> None:
    fits = type(value) in (int, float) and math.isfinite(value) and low <= value <= high and not (above_low and value == low)
    if not fits:
        raise _rejected(
            name,
            f"is {_shown(value)}; a number {'above' if above_low else 'from'} {low:g} {'up ' if above_low else ''}to {high:g} is expected",
        )


def _length(name: str, value: Sized, most: int) -> None:
    if len(value) > most:
        raise _rejected(name, f"has {len(value)} entries; at most {most} are accepted")


def _rejected(param: str, rest: str) -> RequestRejected:
    return RequestRejected(f"{param} {rest}", param=param, code="invalid_value")


def _shown(value: object) -> str:
    """A value short enough to stand in an answer; a client's input is never echoed at length."""
    text = repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
    return text if len(text) <= 40 else text[:37] + "..."
