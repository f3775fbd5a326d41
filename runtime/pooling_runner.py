"""StepPlan -> StepOutput for artifacts that embed: hidden states of the rows that count, pooled per sequence over its steps."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from llmc.artifacts.manifest import PoolingFacts
from llmc.errors import DeviceLost, InternalError
from llmc.runtime.batch import BatchBuilder, LogitsRows
from llmc.runtime.step import Executor, SampledToken, ScheduledSequence, StepOutput, StepPlan


@dataclass(slots=True)
class _Pool:
    """What is kept of one sequence between its steps."""

    total: np.ndarray  # float64 [hidden], of the rows so far
    first: np.ndarray  # float32 [hidden], of its first token


class PoolingRunner:
    """The `Runner` of embeddings. A sequence's "token" is its vector, once its last prompt token is computed.

    Rows are summed in float64 one after another, so a vector's bits do not depend on how its prompt was cut into steps.
    What fails for one sequence becomes that sequence's `SampledToken.error`; when the program fails for a batch, its sequences run
    one by one.
    """

    def __init__(self, executor: Executor, builder: BatchBuilder, pooling: PoolingFacts) -> None:
        self._executor = executor
        self._builder = builder
        self._pooling = pooling
        self._pools: dict[str, _Pool] = {}
        self._submitted: tuple[StepPlan, dict[str, SampledToken]] | None = None

    def submit(self, plan: StepPlan) -> None:
        """Run the program for `plan`."""
        if self._submitted is not None:
            raise InternalError(f"step {plan.step} was submitted before the step before it was collected; please report this")
        results: dict[str, SampledToken] = {}
        accepted: list[ScheduledSequence] = []
        for sequence in plan.sequences:
            try:
                self._builder.check(sequence)
                accepted.append(self._with_rows(sequence))
            except Exception as error:
                results[sequence.request_id] = SampledToken(token_id=-1, error=str(error))
        if accepted:
            self._run(accepted, results)
        self._submitted = (plan, results)

    def collect(self) -> StepOutput:
        """The vectors of the sequences that are through with their prompt."""
        if self._submitted is None:
            raise InternalError("collect without a submitted step; please report this")
        (plan, results), self._submitted = self._submitted, None
        return StepOutput(step=plan.step, tokens=results, prompt_logprobs={})

    def reset(self) -> None:
        """Forget a step that was submitted and will not be collected."""
        self._submitted = None

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a sequence; unknown ids had nothing kept."""
        self._pools.pop(request_id, None)

    def _with_rows(self, sequence: ScheduledSequence) -> ScheduledSequence:
        """The sequence, asking for every row where the pooling reads them all, and for its last alone where it does not."""
        every = self._pooling.kind == "mean" or (self._pooling.kind == "cls" and sequence.start == 0)
        return msgspec.structs.replace(sequence, needs_prompt_logprobs=every)

    def _run(self, sequences: list[ScheduledSequence], results: dict[str, SampledToken]) -> None:
        """Run all at once; when that fails, each alone."""
        try:
            built = self._builder.build(sequences)
            hidden = self._executor.run(built.batch).to_float32()
        except DeviceLost:
            raise  # no sequence can run any more
        except Exception as error:
            if len(sequences) == 1:
                results[sequences[0].request_id] = SampledToken(token_id=-1, error=f"the step failed: {error}")
                return
            for sequence in sequences:
                self._run([sequence], results)
            return
        for sequence, rows in zip(sequences, built.rows, strict=True):
            try:
                vector = self._pool(sequence, rows, hidden)
            except Exception as error:
                results[sequence.request_id] = SampledToken(token_id=-1, error=f"pooling failed: {error}")
                continue
            if vector is None:
                continue
            if np.isfinite(vector).all():
                results[sequence.request_id] = SampledToken(token_id=0, embedding=vector.astype("<f4").tobytes())
            else:
                results[sequence.request_id] = SampledToken(token_id=-1, error="the model gave hidden states that are no finite numbers")

    def _pool(self, sequence: ScheduledSequence, rows: LogitsRows, hidden: np.ndarray) -> np.ndarray | None:
        """Take this step's rows in; the finished vector, or None while the prompt goes on."""
        own = hidden[rows.first : rows.first + rows.num_prompt + (rows.sample is not None)]
        if sequence.start == 0 and len(own):  # also when a preempted sequence begins again
            self._pools[sequence.request_id] = _Pool(total=np.zeros(hidden.shape[1], dtype=np.float64), first=own[0].copy())
        if self._pooling.kind == "mean":
            total = self._pools[sequence.request_id].total
            for row in own:
                total += row
        if rows.sample is None:
            return None
        if self._pooling.kind == "last":
            vector = hidden[rows.sample].astype(np.float64)
        elif self._pooling.kind == "cls":
            vector = self._pools[sequence.request_id].first.astype(np.float64)
        else:
            vector = self._pools[sequence.request_id].total / sequence.end
        if self._pooling.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)  # torch.nn.functional.normalize's bound
        return vector
