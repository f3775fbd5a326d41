"""Speculative decoding in the scheduler: who computes guesses in a step, and what its tokens are once they are checked."""

from __future__ import annotations

from typing import Protocol

import msgspec

from llmc.runtime.kv import KVManager
from llmc.runtime.messages import FinishReason, TokenEvent
from llmc.runtime.scheduler.config import SchedulerConfig
from llmc.runtime.scheduler.counters import Counters
from llmc.runtime.scheduler.request import Sequence
from llmc.runtime.step import SampledToken, ScheduledSequence


class Drafter(Protocol):
    """Guesses what comes next in sequences that decode."""

    def propose_all(self, sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
        """Guesses for each of `sequences` (best rank first), at most its limit; fewer or none where it has none to give."""

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a sequence that has ended; unknown ids had nothing kept."""

    def check(self, live: set[str]) -> bool:
        """Whether its own books agree and nothing is kept of a sequence that is not `live`. Asks."""


def add_guesses(
    drafter: Drafter,
    kv: KVManager,
    config: SchedulerConfig,
    running: list[Sequence],
    sequences: list[Sequence],
    scheduled: list[ScheduledSequence],
) -> None:
    """Let decoding sequences compute guesses too, with budget and blocks that nobody else wants in this step. Allocates blocks.

    Args:
        running: every running sequence.
        sequences: those of the step.
        scheduled: their shares, in the same order; replaced where there are guesses.
    """
    budget = config.max_num_batched_tokens - sum(share.end - share.start for share in scheduled)
    spare = -config.reserve_blocks - sum(kv.blocks_to_finish(s.blocks, len(s.token_ids)) for s in running if s.prefilling)
    decoding: list[int] = []
    limits: list[int] = []
    for index, sequence in enumerate(sequences):
        # Rows of a grammar are masked by what stands before them, which only one token at a time can tell.
        if sequence.prefilling or sequence.sampling.structured_outputs is not None:
            continue
        limit = min(budget, sequence.max_length - len(sequence.token_ids) - 1)  # one token comes out beside the guesses
        if limit >= 1:
            decoding.append(index)
            limits.append(limit)
    if not decoding:
        return
    proposed = drafter.propose_all([sequences[index] for index in decoding], limits)
    for index, guesses in zip(decoding, proposed, strict=True):
        sequence, share, drafts = sequences[index], scheduled[index], guesses[:budget]
        if share.end + len(drafts) > sequence.blocks.ready_tokens:
            kv.return_passed(sequence.blocks, share.start)
            if kv.blocks_to_extend(sequence.blocks, share.end + len(drafts)) <= kv.pool.num_available + spare:
                kv.extend(sequence.blocks, share.end + len(drafts))
            else:
                drafts = drafts[: sequence.blocks.ready_tokens - share.end]
        if drafts:
            budget -= len(drafts)
            scheduled[index] = msgspec.structs.replace(
                share, token_ids=sequence.token_ids + drafts, end=share.end + len(drafts), num_drafts=len(drafts)
            )


def checked_event(sequence: Sequence, share: ScheduledSequence, sampled: SampledToken, kv: KVManager, counters: Counters) -> TokenEvent:
    """Take the tokens of a step with guesses: as many as steps of one token each would have given before an end. Counts them, offers full
    blocks to the prefix cache, and returns the event; where this has a finish_reason, the sequence is to be removed."""
    given: list[SampledToken] = []
    finish_reason: FinishReason | None = None
    for one in (sampled, *sampled.more):
        sequence.token_ids.append(one.token_id)
        given.append(one)
        finish_reason = sequence.end_after(one.token_id)
        if finish_reason is not None:
            break
    counters.num_drafts += 1
    counters.draft_tokens += share.num_drafts
    counters.accepted_tokens += len(given) - 1
    # Guesses that were right are computed; the slots of the others are written again
    sequence.num_computed = len(sequence.token_ids) - 1
    kv.publish(sequence.blocks, sequence.token_ids, sequence.num_computed)
    return TokenEvent(
        request_id=sequence.request_id,
        token_ids=[one.token_id for one in given],
        logprobs=[one.logprobs for one in given if one.logprobs is not None] if sampled.logprobs is not None else None,
        finish_reason=finish_reason,
        stop_token_id=given[-1].token_id if finish_reason == "stop" else None,
    )
