"""Request fields and the model's defaults become the engine's SamplingParams, checked."""

from __future__ import annotations

import msgspec

from llmc.errors import RequestRejected
from llmc.runtime.messages import SamplingParams
from llmc.runtime.sampling_params import check, check_token_ids
from llmc.runtime.server.front import Front
from llmc.runtime.server.schemas import SamplingFields
from llmc.runtime.server.structured import structured_outputs

MAX_REQUEST_TOKENS = 1 << 22  # n x prompts x (prompt or output tokens) of one request
_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def sampling_params(
    front: Front,
    request: SamplingFields,
    prompts: list[list[int]],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    bad_words: list[list[int]] | None = None,
) -> SamplingParams:
    """Fill in defaults and refuse what cannot run.

    Args:
        prompts: token ids of each prompt.
        max_tokens: the client's limit; None: what the context leaves.
        logprobs: top log-probabilities per output token; -1: of the whole vocabulary; None: none at all.
        prompt_logprobs: the same for prompt tokens.
        bad_words: the field bad_words as token ids.

    Raises:
        RequestRejected: naming the field.
    """
    if not all(prompts):
        raise RequestRejected("a prompt has no tokens; send at least one", param="prompt", code="invalid_value")
    longest = max(len(prompt) for prompt in prompts)
    limit = _output_limit(front, longest, max_tokens, request.min_tokens or 0)
    n = request.n or 1
    num_sequences = n * len(prompts)
    most = front.settings.max_sequences_per_request
    if num_sequences > most:
        raise RequestRejected(f"n x prompts is {num_sequences}; at most {most} sequences are accepted in one request", param="n")
    if num_sequences * max(limit, longest) > MAX_REQUEST_TOKENS:
        raise RequestRejected(
            f"n x prompts x max_tokens is {num_sequences * max(limit, longest)}; at most {MAX_REQUEST_TOKENS} are accepted", param="n"
        )
    num_allowed = num_sequences * len(request.allowed_token_ids or ())
    if num_allowed > MAX_REQUEST_TOKENS:  # each sequence has a copy
        raise RequestRejected(
            f"n x prompts x allowed_token_ids is {num_allowed}; at most {MAX_REQUEST_TOKENS} are accepted", param="allowed_token_ids"
        )
    defaults = front.model.generation_defaults
    sampling = SamplingParams(
        n=n,
        **{name: type(neutral)(_first(getattr(request, name), defaults.get(name), neutral)) for name, neutral in _DEFAULTS.items()},  # type: ignore[arg-type]
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in request.logit_bias.items()} if request.logit_bias else None,
        allowed_token_ids=request.allowed_token_ids,
        bad_words_token_ids=bad_words or None,
        seed=request.seed,
        max_tokens=limit,
        min_tokens=request.min_tokens or 0,
        stop=[request.stop] if isinstance(request.stop, str) else request.stop,
        stop_token_ids=request.stop_token_ids,
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        ignore_eos=bool(request.ignore_eos),
        logprobs=_num_top(front, "logprobs", logprobs),
        prompt_logprobs=_num_top(front, "prompt_logprobs", prompt_logprobs),
        skip_special_tokens=request.skip_special_tokens is not False,
        structured_outputs=structured_outputs(request),
    )
    max_logprobs = front.settings.max_logprobs
    check(sampling, vocab_size=front.model.vocab_size, max_logprobs=max_logprobs, max_model_len=front.max_model_len)
    for prompt in prompts:
        check_token_ids(prompt, vocab_size=front.model.vocab_size, param="prompt")
    return sampling


async def bad_word_ids(front: Front, request: SamplingFields) -> list[list[int]]:
    """Each bad word as token ids, as it stands and, where that is another first token, with a space before it, as in vLLM."""
    words = [word.lstrip() for word in request.bad_words or []]
    if any(not word for word in words):
        raise RequestRejected("bad_words holds a word of white space only", param="bad_words", code="invalid_value")
    if not words:
        return []
    plain = await front.encode(words, add_special_tokens=False)
    spaced = await front.encode([" " + word for word in words], add_special_tokens=False)
    inner = [b for a, b in zip(plain, spaced, strict=True) if a and b and b[0] != a[0] and len(b) == len(a)]
    return [ids for ids in plain if ids] + inner


def truncated(front: Front, request: SamplingFields, prompts: list[list[int]], max_tokens: int | None) -> list[list[int]]:
    """The last truncate_prompt_tokens tokens of each prompt; -1: as many as the context holds beside the output.

    Raises:
        RequestRejected: 0, which would leave no prompt.
    """
    most = request.truncate_prompt_tokens
    if most is None:
        return prompts
    if most == 0:
        raise RequestRejected(
            "truncate_prompt_tokens is 0; send 1 or more, or -1 for what the context holds", param="truncate_prompt_tokens"
        )
    if most == -1:
        most = max(1, front.max_model_len - max(1, max_tokens or 1))
    return [prompt[-most:] for prompt in prompts]


def for_choice(sampling: SamplingParams, choice: int) -> SamplingParams:
    """The parameters of one of n samples: its own seed, and prompt log-probabilities with the first only."""
    return msgspec.structs.replace(
        sampling,
        n=1,
        seed=None if sampling.seed is None else _next_seed(sampling.seed, choice),
        prompt_logprobs=sampling.prompt_logprobs if choice == 0 else None,
    )


def _num_top(front: Front, name: str, wanted: int | None) -> int | None:
    """How many top log-probabilities are given where -1 stands for all of them."""
    if wanted != -1:
        return wanted
    most = front.settings.max_logprobs
    if most >= 0:
        raise RequestRejected(
            f"{name} is -1, which asks for the whole vocabulary; at most {most} are given here (--max-logprobs -1 lifts that)",
            param=name,
        )
    return front.model.vocab_size


def _output_limit(front: Front, longest: int, max_tokens: int | None, min_tokens: int) -> int:
    """Output tokens every prompt has room for."""
    context = front.max_model_len
    room = context - longest
    if room < 1 or (max_tokens is not None and max_tokens > room):
        asked = f" and max_tokens {max_tokens}" if max_tokens is not None else ""
        raise RequestRejected(
            f"the context is {context} tokens, but the prompt has {longest}{asked}",
            param="prompt" if room < 1 else "max_tokens",
            code="context_length_exceeded",
        )
    if max_tokens is not None:
        return max_tokens
    default = front.model.generation_defaults.get("max_new_tokens")
    limit = min(room, int(default)) if isinstance(default, int | float) and default >= 1 else room
    return max(limit, min(min_tokens, room))


def _first(*values: object) -> float:
    return next(v for v in values if isinstance(v, int | float))


def _next_seed(seed: int, choice: int) -> int:
    """seed + choice, kept within 64 bits."""
    return (seed + choice + 2**63) % 2**64 - 2**63
