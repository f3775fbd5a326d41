"""StepPlan -> StepOutput: lays out the batch, runs the program, samples. One bad sequence ends alone."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import msgspec
import numpy as np

from llmc.errors import DeviceLost, InternalError
from llmc.runtime.batch import BatchBuilder, BuiltBatch, LogitsRows
from llmc.runtime.device_sampling import RowSampling, SamplingExecutor, merge_fed, rows_on_device, sampled_token
from llmc.runtime.executors.logits import Logits
from llmc.runtime.messages import TokenLogprobs
from llmc.runtime.sampler import Sampler
from llmc.runtime.step import Executor, SampledToken, ScheduledSequence, StepOutput, StepPlan

if TYPE_CHECKING:
    from llmc.runtime.grammar.service import GrammarService
    from llmc.runtime.lora.store import AdapterStore

_Result = tuple[list[ScheduledSequence], BuiltBatch, Logits]  # whose rows of which logits


@dataclass(frozen=True, slots=True, kw_only=True)
class _OnDevice:
    """A step whose tokens are chosen where the logits are. sequences: those that sample, in the order of the rows."""

    sequences: list[ScheduledSequence]
    sampling: RowSampling


class _Submitted(msgspec.Struct, frozen=True, kw_only=True):
    """A step between `submit` and `collect`."""

    plan: StepPlan
    failed: dict[str, SampledToken]
    results: list[_Result]
    structured: bool  # masks were asked for
    lost_slots: tuple[int, ...] = ()  # whose adapters could not be brought
    on_device: _OnDevice | None = None


@dataclass(slots=True, kw_only=True)
class SampledSteps:
    """How often steps were sampled where. Changed by the runner alone."""

    on_device: int = 0
    on_host: int = 0  # of an executor that could sample: those no plan holds
    ahead: int = 0  # of those on the device, begun before the host knew their input tokens


class ModelRunner:
    """The `Runner` of real models. Submits and collects in the caller's thread.

    A step is sampled by the executor if it can do so and every sequence of the step wants nothing else than its plans hold
    (`device_sampling`); any other step's logits come here and the sampler chooses.

    What fails for one sequence (its ids, its logits, its sampling) becomes that sequence's `SampledToken.error`; when the
    program fails for a batch, its sequences run one by one. `adapters` brings LoRA adapters into the slots that a plan names.
    """

    def __init__(self, executor: Executor, sampler: Sampler, builder: BatchBuilder, adapters: AdapterStore | None = None) -> None:
        self._executor = executor
        self._sampler = sampler
        self._builder = builder
        self._adapters = adapters
        self.grammars: GrammarService | None = None  # set by the engine with its first structured request
        self._submitted: deque[_Submitted] = deque()
        self._sampling = cast(SamplingExecutor, executor) if hasattr(executor, "sampling_limits") else None
        self.steps = SampledSteps()

    def submit(self, plan: StepPlan) -> None:
        """Run the program for `plan`. A plan without sequences runs nothing."""
        if self._submitted:
            raise InternalError(
                f"step {plan.step} was submitted before step {self._submitted[0].plan.step} was collected; please report this"
            )
        failed: dict[str, SampledToken] = {}
        lost = self._bring_adapters(plan, failed) if plan.lora_loads else ()
        sequences = [s for s in plan.sequences if s.lora_slot not in lost] if lost else plan.sequences
        built = self._builder.build_decode(sequences) if sequences else None
        accepted = sequences if built is not None else self._checked(sequences, failed)
        structured = [s for s in accepted if s.sampling.structured_outputs is not None and s.samples] if self.grammars is not None else []
        if self.grammars is not None and structured:
            self.grammars.begin(structured)  # masks are computed while the model runs
        built, on_device = self._begin(accepted, built) if accepted and not structured else (built, None)
        results = self._run(accepted, failed, built) if accepted and on_device is None else []
        submitted = _Submitted(plan=plan, failed=failed, results=results, structured=bool(structured), on_device=on_device, lost_slots=lost)
        self._submitted.append(submitted)
        if self._sampling is not None and accepted:
            self.steps.on_device += on_device is not None
            self.steps.on_host += on_device is None

    def can_follow(self) -> bool:
        """Whether the step submitted last can have another behind it before it is collected: its tokens are chosen on the device,
        and nothing that follows depends on the host's knowing them."""
        if len(self._submitted) != 1 or self._submitted[0].failed:
            return False
        first = self._submitted[0].on_device
        return first is not None and first.sampling.can_follow

    def submit_following(self, plan: StepPlan) -> None:
        """Begin the step behind the one submitted last, of whose tokens each sequence's last one is. Ask `can_follow` first."""
        first = self._submitted[-1].on_device if self._submitted else None
        built = self._builder.build_decode(plan.sequences, fed=True)
        if first is None or self._sampling is None or built is None:
            raise InternalError(f"step {plan.step} cannot follow one that is not collected; please report this")
        row_of = {sequence.request_id: row for row, sequence in enumerate(first.sequences)}
        fed = merge_fed([(row_of[sequence.request_id], place) for place, sequence in enumerate(plan.sequences)])
        sampling = rows_on_device(
            self._sampler.wishes(plan.sequences, self._sampling.sampling_limits.vocab), self._sampling.sampling_limits
        )
        if sampling is None or not self._sampling.start(built.batch, sampling, fed):
            raise InternalError(f"step {plan.step} has no plan though the one before it had; please report this")
        on_device = _OnDevice(sequences=plan.sequences, sampling=sampling)
        self._submitted.append(_Submitted(plan=plan, failed={}, results=[], structured=False, on_device=on_device))
        self.steps.on_device += 1
        self.steps.ahead += 1

    def collect(self) -> StepOutput:
        """The tokens of the oldest step submitted: from the device, or chosen here from its logits."""
        if not self._submitted:
            raise InternalError("collect without a submitted step; please report this")
        submitted = self._submitted.popleft()
        tokens = submitted.failed
        prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        masked: list[tuple[ScheduledSequence, np.ndarray]] = []
        results = submitted.results
        if submitted.on_device is not None:
            left = self._take(submitted.on_device, tokens)
            # Only rows that masks and biases leave nothing of; such a step has none behind it, and running it again changes nothing
            results = self._run_apart(left, tokens)
        for sequences, built, given in results:
            plain = self._sampler.plain(sequences, given) if built.one_each else {}
            tokens.update(plain)
            if len(plain) == len(sequences):
                continue
            logits = given.to_float32()
            for sequence, rows in zip(sequences, built.rows, strict=True):
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
        return StepOutput(step=submitted.plan.step, tokens=tokens, prompt_logprobs=prompt_logprobs, lost_lora_slots=submitted.lost_slots)

    def reset(self) -> None:
        """Forget steps that were submitted and will not be collected."""
        self._submitted.clear()
        if self._sampling is not None:
            self._sampling.abandon()

    def _begin(self, sequences: list[ScheduledSequence], built: BuiltBatch | None) -> tuple[BuiltBatch | None, _OnDevice | None]:
        """Begin a step whose tokens are chosen on the device, if it can be. What fails here fails again, and is told, in `_run`."""
        if self._sampling is None or any(s.needs_prompt_logprobs or s.num_drafts for s in sequences):
            return built, None
        sampling = [s for s in sequences if s.samples]
        if not sampling or any(s.sampling.structured_outputs is not None for s in sampling):
            return built, None
        rows = rows_on_device(self._sampler.wishes(sampling, self._sampling.sampling_limits.vocab), self._sampling.sampling_limits)
        if rows is None:
            return built, None
        try:
            built = built if built is not None else self._builder.build(sequences)
            begun = self._sampling.start(built.batch, rows, [])
        except DeviceLost:
            raise
        except Exception:  # the host's way runs each sequence alone where the step fails, and says whose fault it is
            return None, None
        return built, _OnDevice(sequences=sampling, sampling=rows) if begun else None

    def _take(self, on_device: _OnDevice, tokens: dict[str, SampledToken]) -> list[ScheduledSequence]:
        """The tokens that the device chose. Returns the sequences whose logits must tell why there is none."""
        assert self._sampling is not None
        found, left = self._sampling.finish(), []
        for index, sequence in enumerate(on_device.sequences):
            token = sampled_token(found, index, on_device.sampling)
            if token is None:
                left.append(sequence)
            else:
                tokens[sequence.request_id] = token
        return left

    def _bring_adapters(self, plan: StepPlan, failed: dict[str, SampledToken]) -> tuple[int, ...]:
        """Bring the adapters that the plan wants into their slots. Writes errors to `failed`; returns the slots that have theirs not."""
        lost: list[int] = []
        for slot, adapter in plan.lora_loads:
            try:
                if self._adapters is None:
                    raise InternalError("a step wants an adapter of an engine that has none; please report this")
                self._adapters.bring(slot, adapter)
            except Exception as error:
                lost.append(slot)
                failed |= {s.request_id: SampledToken(token_id=-1, error=str(error)) for s in plan.sequences if s.lora_slot == slot}
        return tuple(lost)

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
        """Run all at once; when that fails, each alone, so that only the one at fault ends. Writes errors to `failed`."""
        try:
            built = built if built is not None else self._builder.build(sequences)
            return [(sequences, built, self._executor.run(built.batch))]
        except DeviceLost:
            raise  # no sequence can run any more
        except Exception as error:
            if len(sequences) == 1:
                failed[sequences[0].request_id] = SampledToken(token_id=-1, error=f"the step failed: {error}")
                return []
        return self._run_apart(sequences, failed)

    def _run_apart(self, sequences: list[ScheduledSequence], failed: dict[str, SampledToken]) -> list[_Result]:
        """Run each alone; writing the same K and V again changes nothing. Writes errors to `failed`."""
        results: list[_Result] = []
        for sequence in sequences:
            # copied: an executor's logits are valid until its next run
            results += [(ones, built, Logits(given.to_float32().copy())) for ones, built, given in self._run([sequence], failed)]
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
