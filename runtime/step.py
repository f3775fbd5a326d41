"""The nouns of one engine step, each made by one function and read-only after.

Sequence (scheduler) -> StepPlan (scheduler.plan) -> DeviceBatch (batch.build) -> StepOutput (runner) -> TokenEvent (commit)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np

from llmc.runtime.messages import SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from llmc.runtime.executors.logits import Logits


# One of these and one SampledToken per sequence and step: a msgspec struct is made in a sixth of a frozen dataclass's time, which is why
# what every step makes is one, and without a cycle in it the garbage collector need not look (gc=False).
class ScheduledSequence(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One sequence's share of a step: compute tokens [start, end) of `token_ids`. Read it before the next plan or commit."""

    request_id: str
    token_ids: list[int]  # prompt + generated so far; the scheduler's list, not to be changed
    num_prompt_tokens: int
    start: int  # tokens before it have K and V already
    end: int  # exclusive; end == len(token_ids) means that this step samples
    block_ids: tuple[list[int], ...]  # per KV group: physical block of each logical block; -1 where a window has moved on
    sampling: SamplingParams
    needs_prompt_logprobs: bool  # the rows [start, end) also give prompt log-probabilities
    lora_slot: int = -1  # of the pool of adapters; -1: the model itself
    num_drafts: int = 0  # the last of `token_ids`, which is then a list of its own, are guesses: each is checked by what is sampled

    @property
    def samples(self) -> bool:
        """Whether a token comes out of this step."""
        return self.end == len(self.token_ids)


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Who runs in this step, how many tokens each, in which blocks."""

    step: int
    sequences: list[ScheduledSequence]
    lora_loads: tuple[tuple[int, int], ...] = ()  # (slot, adapter) to be brought into the pool before the step

    @property
    def num_tokens(self) -> int:
        return sum(s.end - s.start for s in self.sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBatch:
    """The step as the compiled program reads it; shapes and dtypes in docs/architecture.md, "The captured graph"."""

    input_ids: np.ndarray
    positions: np.ndarray
    logits_indices: np.ndarray
    slot_mapping: np.ndarray
    block_tables: np.ndarray
    seq_lens: np.ndarray
    query_start_loc: np.ndarray
    lora_slots: np.ndarray | None = None  # of programs with adapters


class SampledToken(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the sampler chose for one sequence; `error` set: this sequence ends with it, the others go on."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    embedding: bytes | None = None  # float32 [hidden], in place of a token: the sequence is done
    more: tuple[SampledToken, ...] = ()  # those behind it, one for each guess that was right
    error: str | None = None
    error_status: int = 500  # 400 where the request itself left nothing to choose
    error_param: str | None = None  # its field that did, if it is one


class StepOutput(msgspec.Struct, frozen=True, kw_only=True):
    """Results by request id; only sequences whose `samples` was true have a token."""

    step: int
    tokens: dict[str, SampledToken]
    prompt_logprobs: dict[str, list[TokenLogprobs]]  # for the rows computed in this step, when asked for
    lost_lora_slots: tuple[int, ...] = ()  # those whose adapter could not be brought; their sequences have errors


class Executor(Protocol):
    """Runs the compiled program. Nothing else in the runtime knows which kind it is (nodes, aoti, later plans)."""

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate the K and V tensors of every layer, zeroed."""

    def run(self, batch: DeviceBatch) -> Logits:
        """Run one step. Returns logits [N, vocab_size] as the program gave them, valid until the next call."""

    def close(self) -> None:
        """Free what it holds."""


class LoraExecutor(Executor, Protocol):
    """An executor of a program with adapters."""

    def bind_lora(self, pool: np.ndarray) -> None:
        """Use this pool, `LoraPool.array`, at every step. Called once, before `allocate_kv`."""


class Runner(Protocol):
    """Turns a StepPlan into a StepOutput. The real one holds an executor and a sampler; tests use one with canned tokens."""

    def submit(self, plan: StepPlan) -> None:
        """Start the step; may return before it is done."""

    def collect(self) -> StepOutput:
        """Wait for the step submitted last."""
