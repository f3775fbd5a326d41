"""StepPlan -> StepOutput: lays out the batch, runs the program, samples. One bad sequence ends alone."""

from __future__ import annotations

import numpy as np

from llmc.errors import InternalError
from llmc.runtime.batch import BatchBuilder, BuiltBatch, LogitsRows
from llmc.runtime.messages import TokenLogprobs
from llmc.runtime.sampler import Sampler
from llmc.runtime.step import Executor, SampledToken, ScheduledSequence, StepOutput, StepPlan


class ModelRunner:
    """The `Runner` of real models. Submits and collects in the caller's thread.

    What fails for one sequence (its ids, its logits, its sampling) becomes that sequence's `SampledToken.error`; what fails for
    the whole program is raised from `submit`.
    """

    def __init__(self, executor: Executor, sampler: Sampler, builder: BatchBuilder) -> None:
        self._executor = executor
        self._sampler = sampler
        self._builder = builder
        self._submitted: tuple[StepPlan, list[ScheduledSequence], BuiltBatch | None, np.ndarray | None] | None = None
        self._failed: dict[str, SampledToken] = {}

    def submit(self, plan: StepPlan) -> None:
        """Run the program for `plan`. A plan without sequences runs nothing."""
        if self._submitted is not None:
            raise InternalError(f"step {plan.step} was submitted before step {self._submitted[0].step} was collected; please report this")
        self._failed = {}
        accepted: list[ScheduledSequence] = []
        for sequence in plan.sequences:
            try:
                self._builder.check(sequence)
                accepted.append(sequence)
            except Exception as error:
                self._failed[sequence.request_id] = SampledToken(token_id=-1, error=str(error))
        if not accepted:
            self._submitted = (plan, accepted, None, None)
            return
        built = self._builder.build(accepted)
        logits = self._executor.run(built.batch)
        self._submitted = (plan, accepted, built, logits)

    def collect(self) -> StepOutput:
        """Sample from the logits of the step submitted last."""
        if self._submitted is None:
            raise InternalError("collect without a submitted step; please report this")
        plan, sequences, built, logits = self._submitted
        self._submitted = None
        tokens = dict(self._failed)
        prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        if built is not None and logits is not None:
            for sequence, rows in zip(sequences, built.rows, strict=True):
                try:
                    self._finish(sequence, rows, logits, tokens, prompt_logprobs)
                except Exception as error:
                    tokens[sequence.request_id] = SampledToken(token_id=-1, error=f"sampling failed: {error}")
        return StepOutput(step=plan.step, tokens=tokens, prompt_logprobs=prompt_logprobs)

    def _finish(
        self,
        sequence: ScheduledSequence,
        rows: LogitsRows,
        logits: np.ndarray,
        tokens: dict[str, SampledToken],
        prompt_logprobs: dict[str, list[TokenLogprobs]],
    ) -> None:
        """One sequence's share of the logits, into `tokens` and `prompt_logprobs`."""
        if rows.num_prompt:
            following = sequence.token_ids[sequence.start + 1 : sequence.start + 1 + rows.num_prompt]
            own = logits[rows.first : rows.first + rows.num_prompt]
            if not np.isfinite(own.max()):
                tokens[sequence.request_id] = SampledToken(token_id=-1, error="the model gave no usable logits for a prompt token")
                return
            prompt_logprobs[sequence.request_id] = self._sampler.prompt_logprobs(own, following, sequence.sampling.prompt_logprobs or 0)
        if rows.sample is not None:
            tokens[sequence.request_id] = self._sampler.sample(logits[rows.sample], sequence)

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a finished sequence."""
        self._sampler.forget(request_id)
