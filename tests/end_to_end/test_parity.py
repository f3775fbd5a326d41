"""Every architecture, compiled and served, answers as Hugging Face does: 64 greedy tokens after 8 prompts, in fp32.

The prompts run together through the scheduler: the step's budget cuts them into chunks, and while one is read others decode. A
prompt whose continuation Hugging Face itself decides by less than twice the tolerance has no right answer, and another is drawn.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from llmc import RequestOutput, SamplingParams
from tests.architectures import NAMES, VOCAB
from tests.end_to_end.served import SHORTEST_PROMPT, Continuation, Recorder, continuation, draw_prompts, generate
from tests.end_to_end.workshop import Workshop

NEW_TOKENS = 64
TOLERANCE = 1e-4  # on fp32 logits
PROMPT_LENGTHS = (1, 3, 9, 16, 17, 33, 50, 90)
NUM_TOP = 3


@pytest.mark.parametrize("name", NAMES)
def test_parity(name: str, workshop: Workshop) -> None:
    reference = workshop.reference(name)
    prompts, expected = clear_cut(reference, [SHORTEST_PROMPT.get(name, 0) + length for length in PROMPT_LENGTHS])
    for level in (2, 0):
        recorder = Recorder()
        params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=NUM_TOP, prompt_logprobs=NUM_TOP)
        found = generate(workshop.artifact(name, level=level), prompts, params, recorder=recorder)
        assert recorder.mixed > 5 and recorder.spans["7.0"][0][0] > 0, "nothing was chunked, or no step was mixed"
        for row, (output, want) in enumerate(zip(found, expected, strict=True)):
            assert output.outputs[0].token_ids == want.tokens, f"-O{level}, prompt {row} of {len(prompts[row])} tokens"
            logits = torch.from_numpy(np.stack(recorder.logits[f"{row}.0"]))
            torch.testing.assert_close(logits, want.logits, atol=TOLERANCE, rtol=0)
            assert_logprobs(output, want, prompts[row])


def clear_cut(reference: nn.Module, lengths: list[int]) -> tuple[list[list[int]], list[Continuation]]:
    """A prompt of each length whose greedy continuation rounding cannot change, and the continuations."""
    prompts: list[list[int]] = []
    expected: list[Continuation] = []
    for seed in range(4):
        for prompt in draw_prompts(lengths[len(prompts) :], VOCAB, seed):
            made = continuation(reference, prompt, NEW_TOKENS)
            if made.least_margin < 2 * TOLERANCE:
                break
            prompts.append(prompt)
            expected.append(made)
        if len(prompts) == len(lengths):
            return prompts, expected
    raise AssertionError(f"the model's logits are too flat: 4 prompts in {len(prompts) + 4} have ties")


def assert_logprobs(output: RequestOutput, want: Continuation, prompt: list[int]) -> None:
    """Log-probabilities of generated and prompt tokens, their ranks, and the best few, against Hugging Face's logits."""
    made = output.outputs[0].logprobs
    given = output.prompt_logprobs
    assert made is not None and given is not None and given[0] is None
    rows = [*zip(given[1:], prompt[1:], want.prompt_logits[:-1], strict=True), *zip(made, want.tokens, want.logits, strict=True)]
    for table, token, logits in rows:
        expected = logits.log_softmax(dim=-1)
        assert table is not None and token in table and NUM_TOP <= len(table) <= NUM_TOP + 1
        for candidate, found in table.items():
            assert abs(found.logprob - float(expected[candidate])) < TOLERANCE
        assert float(expected[token]) + TOLERANCE > sorted(expected.tolist(), reverse=True)[(table[token].rank or 1) - 1]
