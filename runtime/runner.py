"""StepPlan -> StepOutput: lays out the batch, runs the program, samples. One bad sequence ends alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from llmc.errors import DeviceLost, InternalError
from llmc.runtime.batch import BatchBuilder, BuiltBatch, LogitsRows
from llmc.runtime.greedy import greedy_tokens
from llmc.runtime.messages import TokenLogprobs
from llmc.runtime.sampler import Sampler
from llmc.runtime.step import Executor, SampledToken, ScheduledSequence, StepOutput, StepPlan

if TYPE_CHECKING:
    from llmc.runtime.grammar.service import GrammarService

_Result = tuple[list[ScheduledSequence], list[LogitsRows], np.ndarray]  # whose rows of which logits


@dataclass(frozen=True, slots=True, kw_only=True)
class _Submitted:
    """A step between `submit` and `collect`."""

    plan: StepPlan
    failed: dict[str, SampledToken]
    results: list[_Result]
    structured: bool  # masks were asked for


class ModelRunner:
    """The `Runner` of real models. Submits and collects in the caller's thread.

    What fails for one sequence (its ids, its logits, its sampling) becomes that sequence's `SampledToken.error`; when the
    program fails for a batch, its sequences run one by one.
    """

    def __init__(self, executor: Executor, sampler: Sampler, builder: BatchBuilder) -> None:
        self._executor = executor
        self._sampler = sampler
        self._builder = builder
        self.grammars: GrammarService | None = None  # set by the engine with its first structured request
        self._submitted: _Submitted | None = None

    def submit(self, plan: StepPlan) -> None:
        """Run the program for `plan`. A plan without sequences runs nothing."""
        if self._submitted is not None:
            raise InternalError(f"step {plan.step} was submitted before step {self._submitted.plan.step} was collected; please report this")
        failed: dict[str, SampledToken] = {}
        built = self._builder.build_decode(plan.sequences) if plan.sequences else None
        accepted = plan.sequences if built is not None else self._checked(plan.sequences, failed)
        structured = [s for s in accepted if s.sampling.structured_outputs is not None and s.samples] if self.grammars is not None else []
        if self.grammars is not None and structured:
            self.grammars.begin(structured)  # masks are computed while the model runs
        results = self._run(accepted, failed, built) if accepted else []
        self._submitted = _Submitted(plan=plan, failed=failed, results=results, structured=bool(structured))

    def collect(self) -> StepOutput:
        """Sample from the logits of the step submitted last."""
        if self._submitted is None:
            raise InternalError("collect without a submitted step; please report this")
        submitted, self._submitted = self._submitted, None
        tokens = submitted.failed
        prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        masked: list[tuple[ScheduledSequence, np.ndarray]] = []
        for sequences, all_rows, logits in submitted.results:
            plain = self._sampler.plain(sequences, all_rows, logits)
            tokens.update(plain)
            if len(plain) == len(sequences):
                continue
            for sequence, rows in zip(sequences, all_rows, strict=True):
                if sequence.request_id in plain:
                    continue
                try:
                    row = self._finish(sequence, rows, logits, tokens, prompt_logprobs)
                    if row is None:
                        continue
                    if sequence.num_drafts:
                        tokens[sequence.request_id] = self._verified(sequence, rows, logits)
                    elif sequence.sampling.structured_outputs is not None:
                        masked.append((sequence, row))
                    else:
                        tokens[sequence.request_id] = self._sampler.sample(row, sequence)
                except Exception as error:
                    tokens[sequence.request_id] = SampledToken(token_id=-1, error=f"sampling failed: {error}")
        if self.grammars is not None and submitted.structured:
            try:
                tokens.update(self.grammars.sample(masked, self._sampler))
            except Exception as error:
                failure = SampledToken(token_id=-1, error=f"structured output failed: {error}")
                tokens.update({sequence.request_id: failure for sequence, _ in masked})
        return StepOutput(step=submitted.plan.step, tokens=tokens, prompt_logprobs=prompt_logprobs)

    def reset(self) -> None:
        """Forget a step that was submitted and will not be collected."""
        self._submitted = None

    def _checked(self, sequences: list[ScheduledSequence], failed: dict[str, SampledToken]) -> list[ScheduledSequence]:
        """Those that can be computed safely. Writes the others' errors to `failed`."""
        accepted: list[ScheduledSequence] = []
        for sequence in sequences:
            try:
                self._builder.check(sequence)
                accepted.append(sequence)
            except Exception as error:
                failed[sequence.request_id] = SampledToken(token_id=-1, error=str(error))
        return accepted

    def _run(self, sequences: list[ScheduledSequence], failed: dict[str, SampledToken], built: BuiltBatch | None = None) -> list[_Result]:
        """Run all at once; when that fails, each alone, so that only the one at fault ends. Writes errors to `failed`, and tokens that
        are known without logits."""
        try:
            built = built if built is not None else self._builder.build(sequences)
            if (tokens := greedy_tokens(self._executor, self._sampler, sequences, built)) is not None:
                failed.update(tokens)
                return []
            logits = self._executor.run(built.batch)
            return [(sequences, built.rows, logits)]
        except DeviceLost:
            raise  # no sequence can run any more
        except Exception as error:
            if len(sequences) == 1:
                failed[sequences[0].request_id] = SampledToken(token_id=-1, error=f"the step failed: {error}")
                return []
        results: list[_Result] = []
        for sequence in sequences:  # writing the same K and V again changes nothing
            # copied: an executor's logits are valid until its next run
            results += [(ones, rows, logits.copy()) for ones, rows, logits in self._run([sequence], failed)]
        return results

    def _verified(self, sequence: ScheduledSequence, rows: LogitsRows, logits: np.ndarray) -> SampledToken:
        """The sequence's next token, and as long as guesses are right the ones behind them, each chosen as in a step of its own."""
        assert rows.sample is not None
        num_known = len(sequence.token_ids) - sequence.num_drafts
        chosen: list[SampledToken] = []
        for index in range(sequence.num_drafts + 1):
            length = num_known + index
            so_far = msgspec.structs.replace(sequence, token_ids=sequence.token_ids[:length], end=length, num_drafts=0)
            sampled = self._sampler.sample(logits[rows.sample + index], so_far)
            if sampled.error is not None and chosen:
                break  # the step after the good ones says it again
            chosen.append(sampled)
            if sampled.error is not None or index == sequence.num_drafts or sampled.token_id != sequence.token_ids[length]:
                break
        return msgspec.structs.replace(chosen[0], more=tuple(chosen[1:])) if len(chosen) > 1 else chosen[0]

    def _finish(
        self,
        sequence: ScheduledSequence,
        rows: LogitsRows,
        logits: np.ndarray,
        tokens: dict[str, SampledToken],
        prompt_logprobs: dict[str, list[TokenLogprobs]],
    ) -> np.ndarray | None:
        """One sequence's prompt rows into `prompt_logprobs`, or an error into `tokens`; returns the row to sample from, if there is one."""
        if rows.num_prompt:
            following = sequence.token_ids[sequence.start + 1 : sequence.start + 1 + rows.num_prompt]
            own = logits[rows.first : rows.first + rows.num_prompt]
            if not np.isfinite(own.max()):
                tokens[sequence.request_id] = SampledToken(token_id=-1, error="the model gave no usable logits for a prompt token")
                return None
            prompt_logprobs[sequence.request_id] = self._sampler.prompt_logprobs(own, following, sequence.sampling.prompt_logprobs or 0)
        return logits[rows.sample] if rows.sample is not None else None
