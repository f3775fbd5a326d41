"""The step behind one in flight, chosen before that one's tokens are known.

Each sequence that will have a token decodes it. A sequence that ends with the token it gets meanwhile has computed one too many, whose
result is dropped; nobody else gets its blocks before a later step, and a device runs steps in their order.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmc.runtime.kv import KVManager
from llmc.runtime.scheduler.request import Sequence
from llmc.runtime.step import StepPlan


def going_on(plan: StepPlan, planned: Iterable[Sequence]) -> list[tuple[Sequence, int]]:
    """The sequences that decode in the step behind `plan`, each with its number of tokens before `plan` gives another. Asks.

    None do where a sequence of `plan` gets no token, since then its prompt goes on, or gives log-probabilities of its prompt.
    """
    found: list[tuple[Sequence, int]] = []
    for sequence, share in zip(planned, plan.sequences, strict=True):
        known = len(sequence.token_ids)
        if sequence.state != "running":
            continue  # aborted
        if share.end != known or share.needs_prompt_logprobs:
            return []
        if known + 1 < sequence.max_length:
            found.append((sequence, known))
    return found


def extend_all(kv: KVManager, sequences: Iterable[tuple[Sequence, int]]) -> bool:
    """Get each sequence the blocks for one token more than it has now; False: they are not there. Changes the pool."""
    sequences = [(sequence, known) for sequence, known in sequences if known + 1 > sequence.blocks.ready_tokens]
    for sequence, known in sequences:
        kv.return_passed(sequence.blocks, known - 1)  # what the step in flight sees stays
    if sum(kv.blocks_to_extend(sequence.blocks, known + 1) for sequence, known in sequences) > kv.pool.num_available:
        return False
    for sequence, known in sequences:
        kv.extend(sequence.blocks, known + 1)
    return True
