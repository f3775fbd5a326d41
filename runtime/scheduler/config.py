"""The scheduler's settings, resolved: no "auto" is left when one of these is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from llmc.errors import ConfigError
from llmc.runtime.scheduler.drafts import DraftModelConfig, SpeculationConfig

Policy = Literal["fcfs", "priority"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Limits and choices of one scheduler.

    Raises:
        ConfigError: a value is out of range or two disagree.
    """

    max_model_len: int  # tokens of one sequence, prompt and generated
    max_num_seqs: int  # sequences in one step
    max_num_batched_tokens: int  # token budget of one step
    block_size: int  # tokens per block; the artifact's
    num_blocks: int  # physical blocks in the pool, shared by all KV groups
    policy: Policy = "fcfs"
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    long_prefill_token_threshold: int = 0  # most tokens of one prompt computed in one step; 0 = the whole budget
    max_num_partial_prefills: int = 1  # prompts that may stand half computed at the same time
    reserve_blocks: int = 8  # kept free at admission, so that running sequences can still grow
    max_queue: int = 1024  # requests beside the max_num_seqs that run; one more is refused with 429
    eos_token_ids: frozenset[int] = frozenset()
    max_loras: int = 0  # adapters that the sequences of one step may use
    speculation: SpeculationConfig | DraftModelConfig | None = None  # None: every step gives a sequence one token

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "num_blocks", "max_num_partial_prefills", "max_queue"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_model_len < 2:
            raise ConfigError(f"max_model_len={self.max_model_len} leaves no room for one prompt token and one generated token; at least 2")
        if self.long_prefill_token_threshold < 0:
            raise ConfigError(f"long_prefill_token_threshold={self.long_prefill_token_threshold} must be 0 (no limit) or more")
        if self.long_prefill_token_threshold and not self.enable_chunked_prefill:
            raise ConfigError("long_prefill_token_threshold splits prompts, and chunked prefill is off; drop one of the two")
        if self.policy not in get_args(Policy):
            raise ConfigError(f"scheduling policy {self.policy!r} is unknown; accepted: {', '.join(get_args(Policy))}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs={self.max_num_seqs}: "
                "a step could not give every running sequence one token"
            )
        if not 0 <= self.reserve_blocks < self.num_blocks:
            raise ConfigError(f"reserve_blocks={self.reserve_blocks} leaves nothing of {self.num_blocks} blocks to allocate")
