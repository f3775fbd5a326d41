"""What the scheduler counts from its start; the source of /metrics."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.runtime.kv import BlockPool
from llmc.runtime.messages import EngineStats


@dataclass(slots=True, kw_only=True)
class Counters:
    """Running totals. Changed by the scheduler alone."""

    last_progress: float  # the clock at the last committed step
    prefix_queries_tokens: int = 0  # prompt tokens looked up at first admission
    prefix_hits_tokens: int = 0  # of those, found
    num_preemptions: int = 0
    prompt_tokens: int = 0  # of requests that got their first token
    generation_tokens: int = 0
    num_drafts: int = 0  # steps of a sequence that had guesses
    draft_tokens: int = 0  # guesses computed
    accepted_tokens: int = 0  # of those, right ones

    def as_stats(self, *, step: int, num_running: int, num_waiting: int, pool: BlockPool) -> EngineStats:
        """The totals and the present state as the message the engine sends."""
        return EngineStats(
            step=step,
            time=self.last_progress,
            num_running=num_running,
            num_waiting=num_waiting,
            kv_blocks_used=pool.num_held,
            kv_blocks_total=pool.num_blocks,
            prefix_queries_tokens=self.prefix_queries_tokens,
            prefix_hits_tokens=self.prefix_hits_tokens,
            num_preemptions=self.num_preemptions,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            spec_num_drafts=self.num_drafts,
            spec_draft_tokens=self.draft_tokens,
            spec_accepted_tokens=self.accepted_tokens,
        )
