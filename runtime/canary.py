"""Does this artifact, on this machine, say what its compiler's reference said? Asked before the engine is ready.

The expected tokens are forced, all but the last in one prefill and the last as a decode step, so that both paths of the attention
kernel run. A position whose margin lies under the artifact's tolerance could fall either way and is not compared.
"""

from __future__ import annotations

import itertools

from llmc.artifacts.manifest import Canary, Manifest
from llmc.errors import ArtifactError
from llmc.runtime.batch import BatchBuilder
from llmc.runtime.messages import SamplingParams
from llmc.runtime.step import Executor, ScheduledSequence


def run_canaries(manifest: Manifest, executor: Executor, builder: BatchBuilder, *, max_tokens: int, num_blocks: int) -> int:
    """Run every canary that fits.

    Writes blocks from 0 on; nothing else may use the KV cache yet.

    Args:
        max_tokens: most tokens in one step.
        num_blocks: physical blocks there are.

    Returns:
        How many positions were compared.

    Raises:
        ArtifactError: a token differs from the reference where the margin says that it must not.
    """
    compared = 0
    for number, canary in enumerate(manifest.canaries):
        length = len(canary.prompt_token_ids) + len(canary.expected_token_ids)
        blocks_each = -(-length // manifest.kv.block_size)
        if len(canary.margins) != len(canary.expected_token_ids) or not canary.prompt_token_ids or not canary.expected_token_ids:
            raise ArtifactError(f"manifest.json: canary {number} has no prompt, no tokens or not one margin per token; compile again")
        if blocks_each * len(manifest.kv.groups) > num_blocks:
            continue
        compared += _run(number, canary, manifest, executor, builder, max_tokens=max_tokens, blocks_each=blocks_each)
    return compared


def _run(
    number: int, canary: Canary, manifest: Manifest, executor: Executor, builder: BatchBuilder, *, max_tokens: int, blocks_each: int
) -> int:
    token_ids = [*canary.prompt_token_ids, *canary.expected_token_ids]
    first = len(canary.prompt_token_ids)
    groups = len(manifest.kv.groups)
    blocks = tuple(list(range(group * blocks_each, (group + 1) * blocks_each)) for group in range(groups))
    last = len(token_ids) - 1  # the token before it is computed alone, as a decode step; it itself is only compared
    edges = [*range(0, last - 1, max_tokens), last - 1, last] if last > 1 else [0, last]
    compared = 0
    for start, end in itertools.pairwise(edges):
        share = ScheduledSequence(
            request_id=f"canary-{number}",
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            start=start,
            end=end,
            block_ids=blocks,
            sampling=SamplingParams(temperature=0.0),
            needs_prompt_logprobs=True,  # asks for the logits of every row
        )
        builder.check(share)
        logits = executor.run(builder.build([share]).batch)
        for position in range(max(start, first - 1), end):
            step = position + 1 - first
            if canary.margins[step] <= manifest.canary_tolerance:
                continue
            found = int(logits[position - start].argmax())
            expected = canary.expected_token_ids[step]
            if found != expected:
                raise ArtifactError(
                    f"canary {number}: token {step} is {found} where the reference gave {expected} (margin {canary.margins[step]:.3g}); "
                    "the artifact computes something else on this machine, compile it again here or report this"
                )
            compared += 1
    return compared
