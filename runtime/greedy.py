"""Steps of which nobody wants more than each row's largest logit, on executors that find it where the logits are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from llmc.runtime.batch import BuiltBatch
from llmc.runtime.sampler import Sampler
from llmc.runtime.step import DeviceBatch, Executor, SampledToken, ScheduledSequence


class GreedyExecutor(Executor, Protocol):
    """An `Executor` that can leave the logits where they are."""

    def run_greedy(self, batch: DeviceBatch) -> np.ndarray | None:
        """One step. Returns int64 [N], the lowest id of each row's largest logit, -1 where that is not finite; None: it did not run."""


def greedy_tokens(
    executor: Executor, sampler: Sampler, sequences: list[ScheduledSequence], built: BuiltBatch
) -> dict[str, SampledToken] | None:
    """Run a step whose sequences all want the argmax and nothing else.

    Returns:
        request id -> its token; None where somebody wants more, the executor cannot do this, or a row has no largest logit. The step is
        then to be run as any other, which changes nothing that was written.
    """
    run: Callable[[DeviceBatch], np.ndarray | None] | None = getattr(
        executor, "run_greedy", None
    )  # isinstance takes longer than all else here
    if run is None or len(built.batch.logits_indices) != len(sequences):
        return None
    if not sampler.only_argmax(sequences, built.rows):
        return None
    found = run(built.batch)
    if found is None or found.min() < 0:
        return None
    return {sequence.request_id: SampledToken(token_id=token) for sequence, token in zip(sequences, found.tolist(), strict=True)}
