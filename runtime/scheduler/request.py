"""A request while the scheduler owns it: its tokens, its blocks and the rule by which it ends."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Literal

from llmc.errors import RequestRejected
from llmc.runtime.kv import KVManager, SequenceBlocks
from llmc.runtime.messages import FinishReason, GenerateRequest, SamplingParams, TokenLogprobs
from llmc.runtime.scheduler.config import SchedulerConfig
from llmc.runtime.scheduler.policy import Rank, rank_of
from llmc.runtime.step import SampledToken, ScheduledSequence, StepOutput

State = Literal["waiting", "running", "finished"]


@dataclass(slots=True, eq=False)
class Sequence:
    """One accepted request. Changed by the scheduler alone.

    Tokens [0, num_computed) have K and V in `blocks`; [num_computed, len(token_ids)) do not yet. While it decodes that is
    one token, the one sampled last.
    """

    request_id: str
    sampling: SamplingParams
    rank: Rank
    token_ids: list[int]  # prompt + generated
    num_prompt_tokens: int
    stop_token_ids: frozenset[int]  # eos included, unless ignored
    earliest_stop: int  # length from which a stop token counts (min_tokens)
    always_stop: frozenset[int]  # end tokens that count before it: they come where a grammar allows nothing more
    max_length: int  # length at which it ends with "length"
    blocks: SequenceBlocks
    prompt_logprobs: list[TokenLogprobs | None] | None  # collected so far; None: not asked for, or sent already
    adapter: int = 0  # the number of its LoRA adapter; 0: the model itself
    lora_slot: int = -1  # where its adapter is while it runs
    num_overtaken: int = 0  # sequences of other adapters that started before it while it waited for a slot
    state: State = "waiting"
    prefilling: bool = True  # more than the newest token has no K and V yet
    num_computed: int = 0
    num_cached_tokens: int = -1  # found in the prefix cache at first admission; -1 before
    scheduled_at: float = 0.0  # when that was, by the scheduler's clock

    def end_after(self, token: int) -> FinishReason | None:
        """Why the sequence ends with `token`, its newest, if it does."""
        if token in self.stop_token_ids and (len(self.token_ids) >= self.earliest_stop or token in self.always_stop):
            return "stop"
        return "length" if len(self.token_ids) >= self.max_length else None

    @property
    def num_prompt_rows(self) -> int:
        """Rows whose next token belongs to the prompt: those that give prompt log-probabilities."""
        return self.num_prompt_tokens - 1


def make_sequence(request: GenerateRequest, config: SchedulerConfig, kv: KVManager, *, tokens_that_fit: int, adapter: int = 0) -> Sequence:
    """Check a request against what this scheduler can ever run and turn it into a Sequence. Holds no block yet.

    Args:
        adapter: the number of its LoRA adapter; 0: the model itself.
        tokens_that_fit: most tokens whose K and V one sequence alone can keep in the pool.

    Raises:
        RequestRejected: it can never run.
    """
    prompt, sampling = request.prompt_token_ids, request.sampling
    _check_tokens(prompt)
    num_prompt = len(prompt)
    if num_prompt > config.max_model_len - 1:
        raise RequestRejected(
            f"the prompt has {num_prompt} tokens; at most {config.max_model_len - 1} fit beside one generated token "
            f"(max_model_len={config.max_model_len})",
            param="prompt",
            code="context_length_exceeded",
        )
    if not config.enable_chunked_prefill and num_prompt > config.max_num_batched_tokens:
        raise RequestRejected(
            f"the prompt has {num_prompt} tokens; without chunked prefill at most {config.max_num_batched_tokens} can run "
            "(max_num_batched_tokens)",
            param="prompt",
            code="context_length_exceeded",
        )
    if sampling.max_tokens is not None and sampling.max_tokens < 1:
        raise RequestRejected(f"max_tokens must be at least 1, found {sampling.max_tokens}", param="max_tokens")

    # The last token is never computed, so a sequence of n tokens keeps K and V of n - 1.
    longest = min(config.max_model_len, tokens_that_fit + 1)
    wanted = num_prompt + (1 if sampling.max_tokens is None else sampling.max_tokens)
    if min(wanted, config.max_model_len) > longest:
        raise RequestRejected(
            f"prompt ({num_prompt}) and max_tokens ({sampling.max_tokens}) need more KV blocks than the pool's {config.num_blocks} "
            f"of {config.block_size} tokens; a sequence of at most {longest} tokens fits",
            param="max_tokens",
            code="context_length_exceeded",
        )
    stop_ids = frozenset(sampling.stop_token_ids or ())
    return Sequence(
        request_id=request.request_id,
        sampling=sampling,
        rank=rank_of(request, config.policy),
        token_ids=list(prompt),
        num_prompt_tokens=num_prompt,
        stop_token_ids=stop_ids if sampling.ignore_eos else stop_ids | config.eos_token_ids,
        earliest_stop=num_prompt + sampling.min_tokens,
        always_stop=config.eos_token_ids if sampling.structured_outputs is not None else frozenset(),
        max_length=longest if sampling.max_tokens is None else min(longest, wanted),
        blocks=kv.new_sequence(prompt, request.cache_salt, adapter),
        prompt_logprobs=None if sampling.prompt_logprobs is None else [None],
        adapter=adapter,
    )


def _check_tokens(prompt: list[int]) -> None:
    """Refuse what would fail later, in the middle of a step; the width of the logits is checked where the model is known."""
    if not prompt:
        raise RequestRejected("the prompt has no tokens; at least one is needed", param="prompt")
    try:
        array("i", prompt)
    except (TypeError, OverflowError) as error:
        raise RequestRejected("a prompt token is not an integer of at most 31 bits", param="prompt") from error
    if min(prompt) < 0:
        raise RequestRejected("a prompt token is negative", param="prompt")


def share_of(sequence: Sequence, start: int, end: int) -> ScheduledSequence:
    """Tokens [start, end) of a sequence as a step computes them."""
    return ScheduledSequence(
        request_id=sequence.request_id,
        token_ids=sequence.token_ids,
        num_prompt_tokens=sequence.num_prompt_tokens,
        start=start,
        end=end,
        block_ids=sequence.blocks.groups,
        sampling=sequence.sampling,
        needs_prompt_logprobs=sequence.prompt_logprobs is not None and start < sequence.num_prompt_tokens - 1,
        lora_slot=sequence.lora_slot,
    )


def problem_of(sequence: Sequence, share: ScheduledSequence, samples: bool, sampled: SampledToken | None, output: StepOutput) -> str | None:
    """Why a sequence must end with an error, or None. Takes its prompt log-probabilities."""
    if sampled is not None and sampled.error is not None:
        return sampled.error
    if samples and sampled is None:
        return "the step gave this sequence no token; please report this"
    if share.needs_prompt_logprobs and sequence.prompt_logprobs is not None:
        rows = min(share.end, sequence.num_prompt_rows) - share.start
        found = output.prompt_logprobs.get(sequence.request_id, [])
        if len(found) < rows:
            return f"the step gave {len(found)} prompt log-probabilities instead of {rows}; please report this"
        sequence.prompt_logprobs.extend(found[:rows])
    return None
