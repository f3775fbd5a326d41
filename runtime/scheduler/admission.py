"""What a waiting sequence would compute if it were admitted now, and whose turn it is. All but `take_slot` and `leave_slot` ask."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.runtime.kv import KVManager, PrefixHit
from llmc.runtime.lora.slots import LoraSlots
from llmc.runtime.scheduler.config import SchedulerConfig
from llmc.runtime.scheduler.request import Sequence
from llmc.runtime.step import ScheduledSequence

# How many requests of LoRA adapters that have slots may start before one that waits for a slot.
MAX_OVERTAKING = 64


@dataclass(slots=True)
class SlotQueue:
    """One look through the queue: who waits for a slot of the pool of adapters, and who may pass."""

    slots: LoraSlots
    first: Sequence | None = None  # the first that waits

    def must_wait(self, sequence: Sequence) -> bool:
        """Whether a sequence has no slot now, or would overtake one that waits once too often. Remembers the first that waits."""
        if not sequence.adapter:
            return False
        overtakes = self.first is not None and self.first.num_overtaken >= MAX_OVERTAKING
        if not overtakes and self.slots.can_acquire(sequence.adapter):
            return False
        self.first = self.first or sequence
        return True

    def started(self, sequence: Sequence) -> None:
        """Count that `sequence` went past the first that waits."""
        if self.first is not None and sequence.adapter:
            self.first.num_overtaken += 1


def take_slot(slots: LoraSlots, sequence: Sequence) -> None:
    """Its adapter has one running sequence more. Changes both; ask `SlotQueue.must_wait` first."""
    if sequence.adapter:
        sequence.lora_slot = slots.acquire(sequence.adapter)


def leave_slot(slots: LoraSlots, sequence: Sequence) -> None:
    """Its adapter has one running sequence less. Changes both."""
    if sequence.adapter:
        slots.release(sequence.adapter)
        sequence.lora_slot = -1


def chunk(config: SchedulerConfig, remaining: int, budget: int, *, begun: bool) -> int:
    """How many of a prompt's `remaining` tokens may run now; 0: none."""
    # Without chunked prefill, chunks are for a preempted sequence that outgrew the budget alone: in one step it could never run again.
    if not config.enable_chunked_prefill and not begun and remaining <= config.max_num_batched_tokens:
        return remaining if remaining <= budget else 0
    return min(remaining, config.long_prefill_token_threshold or remaining, budget)


def match(kv: KVManager, sequence: Sequence) -> PrefixHit:
    """What of a waiting sequence is cached. Prompt log-probabilities need every row computed, so they hit nothing."""
    return kv.match(sequence.blocks, len(sequence.token_ids) if sequence.prompt_logprobs is None else 0)


def next_digest(config: SchedulerConfig, sequence: Sequence, hit: PrefixHit) -> bytes | None:
    """Digest of the first block that a later hit could add, if there is one."""
    reusable = (len(sequence.token_ids) - 1) // config.block_size
    if sequence.prompt_logprobs is not None or hit.num_blocks >= min(reusable, len(sequence.blocks.digests)):
        return None
    return sequence.blocks.digests[hit.num_blocks]


def digests(config: SchedulerConfig, sequence: Sequence, share: ScheduledSequence) -> list[bytes]:
    """Digests of the blocks that become full in this step."""
    return sequence.blocks.digests[share.start // config.block_size : share.end // config.block_size]
