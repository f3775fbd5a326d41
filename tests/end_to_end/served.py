"""Generate through the served path and see the logits of every row, beside what Hugging Face says of the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmc import LLM, RequestOutput, SamplingParams
from llmc.runtime.executors.logits import Logits
from llmc.runtime.step import SampledToken, ScheduledSequence, StepPlan

# A step takes 24 tokens: prompts come in chunks, and while one is read others decode in the same steps.
CHUNKED: dict[str, Any] = {"threads": 1, "max_num_seqs": 8, "max_num_batched_tokens": 24, "num_blocks": 400}

# Above 64 tokens Hugging Face takes longrope's other factors, within one sequence even; an artifact has those of its longest sequence.
SHORTEST_PROMPT = {"phi3_longrope": 64}


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What Hugging Face says. tokens: greedy. logits: float32 [tokens, V]. prompt_logits: float32 [prompt tokens, V]."""

    tokens: list[int]
    logits: Tensor
    prompt_logits: Tensor

    @property
    def least_margin(self) -> float:
        """The smallest distance between the best logit of a step and the next best."""
        best = self.logits.topk(2, dim=-1).values
        return float((best[:, 0] - best[:, 1]).min())


@dataclass
class Recorder:
    """Sees every row of logits that an engine samples from, and can choose in the sampler's place.

    forced: request id -> tokens given instead of the sampled ones.
    logits: request id -> float32 rows [V] in order.
    spans: request id -> the tokens [start, end) computed in each step that sampled.
    mixed: steps in which one sequence read its prompt while another decoded.
    """

    forced: dict[str, Sequence[int]] = field(default_factory=dict)
    logits: dict[str, list[np.ndarray]] = field(default_factory=dict)
    spans: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    mixed: int = 0

    def watch(self, llm: LLM) -> None:
        """Stand between the engine, its runner and its sampler from now on."""
        runner, sampler = llm.engine._runner, llm.engine._sampler
        submit, sample, plain = runner.submit, sampler.sample, sampler.plain

        def counted(plan: StepPlan) -> None:
            self.mixed += {True, False} == {sequence.start < sequence.num_prompt_tokens for sequence in plan.sequences}
            submit(plan)

        def recorded(logits: np.ndarray, sequence: ScheduledSequence, chosen: SampledToken) -> SampledToken:
            rows = self.logits.setdefault(sequence.request_id, [])
            rows.append(logits)
            self.spans.setdefault(sequence.request_id, []).append((sequence.start, sequence.end))
            wanted = self.forced.get(sequence.request_id)
            return chosen if wanted is None else SampledToken(token_id=wanted[len(rows) - 1], logprobs=chosen.logprobs)

        def sampled(logits: np.ndarray, sequence: ScheduledSequence) -> SampledToken:
            before = logits.copy()  # sampling changes its row
            return recorded(before, sequence, sample(logits, sequence))

        def together(sequences: Sequence[ScheduledSequence], logits: Logits) -> dict[str, SampledToken]:
            found = plain(sequences, logits)
            return {
                sequence.request_id: recorded(row.copy(), sequence, found[sequence.request_id])
                for sequence, row in zip(sequences, logits.to_float32(), strict=True)
                if sequence.request_id in found
            }

        runner.submit = counted  # type: ignore[method-assign]
        sampler.sample, sampler.plain = sampled, together  # type: ignore[method-assign]


def continuation(model: nn.Module, prompt: list[int], count: int) -> Continuation:
    """`count` greedy tokens after `prompt`, never stopping early."""
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]  # never stop: generate takes it from here when told None
    with torch.no_grad():
        made = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        prompt_logits = model(input_ids=ids, use_cache=False).logits[0].float()
    logits = torch.cat(made.logits).float()
    assert len(logits) == count
    return Continuation(tokens=made.sequences[0, len(prompt) :].tolist(), logits=logits, prompt_logits=prompt_logits)


def draw_prompts(lengths: Sequence[int], vocab_size: int, seed: int) -> list[list[int]]:
    """Random prompts of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def generate(
    artifact: Path, prompts: Sequence[list[int]], params: SamplingParams, *, recorder: Recorder | None = None, **options: Any
) -> list[RequestOutput]:
    """All prompts at once through an engine of `artifact`; `options` are fields of EngineConfig. Request i has the id "i.0"."""
    with LLM(artifact, **{**CHUNKED, **options}) as llm:
        if recorder is not None:
            recorder.watch(llm)
        outputs = llm.generate(list(prompts), params)
        assert not llm.engine.has_work()
        for output in outputs:
            assert output.outputs[0].error is None, output.outputs[0].error
        return outputs
