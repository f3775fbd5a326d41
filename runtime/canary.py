"""Does this artifact, on this machine, say what its compiler's reference said? Asked before the engine is ready.

The expected tokens are forced, all but the last in one prefill and the last as a decode step, so that both paths of the attention
kernel run. As many canaries as fit run as one batch: a step reads every weight once, however many sequences it has. Where the
reference's best logits lie within the artifact's tolerance of each other, the artifact may choose any of these tokens, and no other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmc.artifacts.manifest import Canary, Manifest
from llmc.errors import ArtifactError
from llmc.runtime.batch import BatchBuilder
from llmc.runtime.messages import SamplingParams
from llmc.runtime.step import Executor, ScheduledSequence


@dataclass(frozen=True, kw_only=True, slots=True)
class _Forced:
    """A canary's tokens, prompt and answer, and the intervals [start, end) that its steps compute."""

    number: int
    canary: Canary
    token_ids: list[int]
    num_blocks: int  # per KV group
    steps: list[tuple[int, int]]


def run_canaries(manifest: Manifest, executor: Executor, builder: BatchBuilder, *, max_tokens: int, max_seqs: int, num_blocks: int) -> int:
    """Run every canary that fits.

    Writes blocks from 0 on; nothing else may use the KV cache yet.

    Args:
        max_tokens, max_seqs: most tokens and sequences in one step.
        num_blocks: physical blocks there are.

    Returns:
        How many positions were compared.

    Raises:
        ArtifactError: a token differs from the reference where the margin says that it must not.
    """
    groups = len(manifest.kv.groups)
    forced = [_forced(number, canary, manifest.kv.block_size, max_tokens) for number, canary in enumerate(manifest.canaries)]
    forced = [one for one in forced if one.num_blocks * groups <= num_blocks]
    batches = _batches(forced, max_tokens=max_tokens, max_seqs=max_seqs, num_blocks=num_blocks // groups)
    return sum(_run(batch, manifest, executor, builder) for batch in batches)


def _forced(number: int, canary: Canary, block_size: int, max_tokens: int) -> _Forced:
    lengths = {len(per_token) for per_token in (canary.expected_token_ids, canary.margins, canary.close_token_ids) if per_token is not None}
    if len(lengths) != 1 or not canary.prompt_token_ids or not canary.expected_token_ids:
        raise ArtifactError(
            f"manifest.json: canary {number} has no prompt, no tokens or not one margin and list of close tokens per token; compile again"
        )
    token_ids = [*canary.prompt_token_ids, *canary.expected_token_ids]
    last = len(token_ids) - 1  # the token before it is computed alone, as a decode step; it itself is only compared
    edges = [*range(0, last - 1, max_tokens), last - 1, last] if last > 1 else [0, last]
    blocks = -(-len(token_ids) // block_size)
    return _Forced(number=number, canary=canary, token_ids=token_ids, num_blocks=blocks, steps=list(itertools.pairwise(edges)))


def _batches(forced: Sequence[_Forced], *, max_tokens: int, max_seqs: int, num_blocks: int) -> Iterator[list[_Forced]]:
    """Canaries that run side by side, in their order: at every step they have no more tokens, sequences and blocks than there are."""
    batch: list[_Forced] = []
    for one in forced:
        wider = [*batch, one]
        steps = itertools.zip_longest(*(each.steps for each in wider), fillvalue=(0, 0))
        tokens = max(sum(end - start for start, end in step) for step in steps)
        if batch and (tokens > max_tokens or len(wider) > max_seqs or sum(each.num_blocks for each in wider) > num_blocks):
            yield batch
            wider = [one]
        batch = wider
    if batch:
        yield batch


def _run(batch: Sequence[_Forced], manifest: Manifest, executor: Executor, builder: BatchBuilder) -> int:
    groups = len(manifest.kv.groups)
    firsts = list(itertools.accumulate((one.num_blocks * groups for one in batch), initial=0))
    compared = 0
    for number in range(max(len(one.steps) for one in batch)):
        running = [(one, first) for one, first in zip(batch, firsts, strict=False) if number < len(one.steps)]
        shares = [
            forced_share(
                f"canary-{one.number}", one.token_ids, *one.steps[number], groups=groups, num_blocks=one.num_blocks, first_block=first
            )
            for one, first in running
        ]
        for share in shares:
            builder.check(share)
        built = builder.build(shares)
        logits = executor.run(built.batch).to_float32()
        for (one, _), rows in zip(running, built.rows, strict=True):
            compared += _compare(one, *one.steps[number], logits[rows.first :], manifest.canary_tolerance)
    return compared


def forced_share(
    name: str, token_ids: list[int], start: int, end: int, *, groups: int, num_blocks: int, first_block: int = 0
) -> ScheduledSequence:
    """Tokens [start, end) of a sequence whose tokens are all known, asking for the logits of every row.

    Args:
        groups: KV groups of the artifact.
        num_blocks: that each of them has for the sequence.
        first_block: the first of these; the others lie behind it, group by group.
    """
    edges = range(first_block, first_block + (groups + 1) * num_blocks, num_blocks)
    return ScheduledSequence(
        request_id=name,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        start=start,
        end=end,
        block_ids=tuple(list(range(a, b)) for a, b in itertools.pairwise(edges)),
        sampling=SamplingParams(temperature=0.0),
        needs_prompt_logprobs=True,  # asks for the logits of every row
    )


def _compare(one: _Forced, start: int, end: int, logits: np.ndarray, tolerance: float) -> int:
    """Hold a step's logits, of positions [start, end), against the tokens that follow them; how many were compared."""
    canary, prompt = one.canary, len(one.canary.prompt_token_ids)
    compared = 0
    for position in range(max(start, prompt - 1), end):
        step = position + 1 - prompt
        close = _close(canary, step, tolerance)
        if not close:
            continue
        found = int(logits[position - start].argmax())
        if found not in close:
            expected, others = canary.expected_token_ids[step], len(close) - 1
            rivals = f", {others} more within {tolerance:g} of it" if others else ""
            raise ArtifactError(
                f"canary {one.number}: token {step} is {found} where the reference gave {expected} (margin {canary.margins[step]:.3g}"
                f"{rivals}); the artifact computes something else on this machine, compile it again here or report this"
            )
        compared += 1
    return compared


def _close(canary: Canary, step: int, tolerance: float) -> list[int]:
    """The tokens that may be best at a step; none: it is not compared."""
    if canary.close_token_ids is not None:
        return canary.close_token_ids[step]
    return [canary.expected_token_ids[step]] if canary.margins[step] > tolerance else []
