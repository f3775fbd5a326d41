"""Runs a draft model ahead of sequences that decode, and keeps the books of its KV cache.

For each sequence, tokens [0, num_computed) have K and V in the draft's own blocks. A turn first computes what is known and not yet
computed, for all sequences in one step, then one guess after the other, batched. What the model accepted of the last guesses stays
computed; slots of the others are written again. A sequence that is not caught up within a step's tokens goes on in the next turn and
has no guesses until then, and so has one for which the pool holds no blocks: guesses may come late or never, and change no token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from llmc.errors import InternalError
from llmc.runtime.kv import KVManager, SequenceBlocks
from llmc.runtime.sampler import Sampler
from llmc.runtime.scheduler.request import Sequence
from llmc.runtime.speculation.load import DraftModel
from llmc.runtime.step import ScheduledSequence


@dataclass(slots=True, eq=False)
class _Draft:
    """What is computed of one sequence. Changed by `ModelDrafter` alone."""

    blocks: SequenceBlocks
    num_computed: int  # of the tokens below, those with K and V
    num_known: int = 0  # tokens that were the sequence's own at the last turn
    guesses: list[int] = field(default_factory=list)  # those behind them


@dataclass(slots=True, eq=False)
class _Share:
    """One sequence's part of a turn."""

    place: int  # in what `propose_all` was asked
    sequence: Sequence
    draft: _Draft
    token_ids: list[int]  # a list of its own, which guesses are appended to
    end: int  # tokens known and computed after the first step
    limit: int  # guesses wanted


class ModelDrafter:
    """The `Drafter` of a draft model. Used in the engine's thread, between steps of the model it guesses for.

    Args:
        model: the draft.
        sampler: the model's own; it is asked what it would choose, and changes nothing for that.
        secret: key of the prefix cache's hashes; None makes a random one.
    """

    def __init__(self, model: DraftModel, sampler: Sampler, *, secret: bytes | None = None) -> None:
        self._model = model
        self._sampler = sampler
        limits = model.limits
        self._kv = KVManager(
            model.manifest.kv,
            num_blocks=limits.num_blocks,
            max_chunk_tokens=limits.max_num_batched_tokens,
            enable_prefix_caching=limits.enable_prefix_caching,
            secret=secret,
        )
        self._drafts: dict[str, _Draft] = {}

    def propose_all(self, sequences: list[Sequence], limits: list[int]) -> list[list[int]]:
        """Guesses for each of `sequences` (best rank first), at most its limit. Runs the draft; allocates blocks of its pool.

        Raises:
            LlmcError: the draft's program failed.
        """
        proposed: list[list[int]] = [[] for _ in sequences]
        shares = self._shares(sequences, limits)
        if not shares:
            return proposed
        logits = self._catch_up(shares)
        active = [share for share in shares if share.end == len(share.sequence.token_ids)]
        while active:
            scheduled = [_scheduled(share, len(share.token_ids) - 1) for share in active]
            chosen = self._sampler.guesses(scheduled, logits)
            going_on = []
            for share, token in zip(active, chosen, strict=True):
                if token < 0:
                    continue
                share.token_ids.append(token)
                share.draft.guesses.append(token)
                if len(share.draft.guesses) < share.limit:
                    going_on.append(share)
            active = going_on
            if active:
                logits = self._run([_scheduled(share, len(share.token_ids) - 1) for share in active])
                for share in active:
                    share.draft.num_computed = len(share.token_ids)
        for share in shares:
            proposed[share.place] = list(share.draft.guesses)
        return proposed

    def forget(self, request_id: str) -> None:
        """Give back the blocks of a sequence that has ended; unknown ids hold none."""
        draft = self._drafts.pop(request_id, None)
        if draft is not None:
            self._kv.free(draft.blocks)

    def check(self, live: set[str]) -> bool:
        """Whether every block is accounted for and nothing is kept of a sequence that has ended. Asks.

        Raises:
            InternalError: the pool and the tables disagree.
        """
        self._kv.check(draft.blocks for draft in self._drafts.values())
        return self._drafts.keys() <= live

    def drop_cache(self) -> None:
        """Forget all cached prefixes; running sequences keep theirs."""
        self._kv.drop_cache()

    def close(self) -> None:
        """Free the draft's weights and KV cache."""
        self._model.executor.close()

    @property
    def num_held_blocks(self) -> int:
        """Blocks of the draft's pool that sequences hold."""
        return self._kv.pool.num_held

    def _shares(self, sequences: list[Sequence], limits: list[int]) -> list[_Share]:
        """Who takes part in this turn, with blocks for all that it computes."""
        own = self._model.limits
        budget, shares = own.max_num_batched_tokens, list[_Share]()
        keep: set[str] = set()  # those that rank no lower than the one at hand
        for place, (sequence, asked) in enumerate(zip(sequences, limits, strict=True)):
            keep.add(sequence.request_id)
            known = len(sequence.token_ids)
            limit = min(asked, self._model.num_speculative_tokens, own.max_model_len - known)
            if budget == 0 or len(shares) == own.max_num_seqs:
                break
            if limit < 1:
                continue
            draft = self._draft(sequence)
            start = draft.num_computed
            end = min(known, start + budget)
            last = end if end < known else known + limit - 1  # the last guess is not computed
            if not self._make_room(draft, start, last, keep):
                continue
            budget -= end - start
            draft.num_known, draft.guesses = end, []
            shares.append(_Share(place=place, sequence=sequence, draft=draft, token_ids=sequence.token_ids[:], end=end, limit=limit))
        return shares

    def _draft(self, sequence: Sequence) -> _Draft:
        """What is computed of `sequence`, less the guesses that were wrong; at least one token is left to compute."""
        known = len(sequence.token_ids)
        draft = self._drafts.get(sequence.request_id)
        if draft is None:
            # The root stands for the tenant: prefixes are shared among those who share them in the model's own cache.
            blocks = self._kv.new_sequence(sequence.token_ids, sequence.blocks.root.hex())
            hit = self._kv.match(blocks, known)
            self._kv.attach(blocks, hit)
            draft = _Draft(blocks=blocks, num_computed=hit.num_blocks * self._kv.block_size)
            self._drafts[sequence.request_id] = draft
            return draft
        right = 0
        for guess, token in zip(draft.guesses, sequence.token_ids[draft.num_known :], strict=False):
            if guess != token:
                break
            right += 1
        draft.num_computed = min(draft.num_computed, draft.num_known + right, known - 1)
        return draft

    def _make_room(self, draft: _Draft, start: int, end: int, keep: set[str]) -> bool:
        """Blocks for tokens [start, end), taken if need be from sequences that are not in `keep`. False: there are not enough."""
        kv = self._kv
        kv.return_passed(draft.blocks, start)
        while kv.blocks_to_extend(draft.blocks, end) > kv.pool.num_available:
            victim = next((request_id for request_id in reversed(self._drafts) if request_id not in keep), None)
            if victim is None:
                return False
            self.forget(victim)
        kv.extend(draft.blocks, end)
        return True

    def _catch_up(self, shares: list[_Share]) -> np.ndarray:
        """Compute what is known of every share; the logits of those that are complete, in their order."""
        scheduled = [_scheduled(share, share.draft.num_computed, share.end) for share in shares]
        logits = self._run(scheduled)
        for share in shares:
            share.draft.num_computed = share.end
            self._kv.publish(share.draft.blocks, share.token_ids, share.end)
        return logits

    def _run(self, scheduled: list[ScheduledSequence]) -> np.ndarray:
        """One step of the draft: float32 logits, one row for each that samples."""
        builder = self._model.builder
        for share in scheduled:
            builder.check(share)
        built = builder.build_decode(scheduled) or builder.build(scheduled)
        logits = self._model.executor.run(built.batch).to_float32()
        if len(logits) < sum(share.samples for share in scheduled):
            raise InternalError(f"the draft gave {len(logits)} rows of logits for {len(scheduled)} sequences; please report this")
        return logits


def _scheduled(share: _Share, start: int, end: int | None = None) -> ScheduledSequence:
    return ScheduledSequence(
        request_id=share.sequence.request_id,
        token_ids=share.token_ids,
        num_prompt_tokens=share.sequence.num_prompt_tokens,
        start=start,
        end=len(share.token_ids) if end is None else end,
        block_ids=share.draft.blocks.groups,
        sampling=share.sequence.sampling,
        needs_prompt_logprobs=False,
    )
