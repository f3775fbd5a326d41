"""What TVM compiled, served, answers as Hugging Face does: chunked prefill and decode in fp32, tokens and logits.

llama and qwen3 in every run; the other architectures in `make test-slow`, where each is either answered alike or refused by its op.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmc import SamplingParams
from llmc.errors import UnsupportedModel
from tests.architectures import NAMES, VOCAB
from tests.end_to_end.served import SHORTEST_PROMPT, Recorder, continuation, draw_prompts, generate
from tests.end_to_end.test_parity import TOLERANCE, clear_cut
from tests.end_to_end.workshop import Workshop

FAST = ("llama", "qwen3")
PROMPT_LENGTHS = (1, 17, 33, 50)
# Mixtures of experts have ops without a converter, which the refusal names.
REFUSED = dict.fromkeys(("qwen3_moe", "mixtral", "gpt_oss"), r"aten\.topk\.default, llmc\.grouped_linear\.default")


@pytest.mark.parametrize("level", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_tokens_and_logits_are_those_of_hugging_face(name: str, level: int, workshop: Workshop) -> None:
    if name in REFUSED:
        with pytest.raises(UnsupportedModel, match=REFUSED[name]):
            workshop.artifact(name, level=level, backend="tvm")
        return
    reference = workshop.reference(name)
    prompts, expected = clear_cut(reference, [SHORTEST_PROMPT.get(name, 0) + length for length in PROMPT_LENGTHS])
    recorder = Recorder()
    params = SamplingParams(temperature=0.0, max_tokens=len(expected[0].tokens), ignore_eos=True)
    found = generate(workshop.artifact(name, level=level, backend="tvm"), prompts, params, recorder=recorder)
    assert recorder.mixed > 2, "no step was mixed"
    for row, (output, want) in enumerate(zip(found, expected, strict=True)):
        assert output.outputs[0].token_ids == want.tokens, f"prompt {row} of {len(prompts[row])} tokens"
        logits = torch.from_numpy(np.stack(recorder.logits[f"{row}.0"]))
        torch.testing.assert_close(logits, want.logits, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
def test_bfloat16_is_as_near_to_hugging_face_as_inductor_is(workshop: Workshop) -> None:
    reference = workshop.reference("qwen3", torch.bfloat16)
    prompt = draw_prompts([40], VOCAB, 0)[0]
    want = continuation(reference, prompt, 12)
    apart = {}
    for backend in ("inductor", "tvm"):
        recorder = Recorder(forced={"0.0": want.tokens})
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        generate(workshop.artifact("qwen3", dtype=torch.bfloat16, backend=backend), [prompt], params, recorder=recorder)
        logits = torch.from_numpy(np.stack(recorder.logits["0.0"]))
        apart[backend] = float((logits - want.logits).abs().mean())
    assert apart["tvm"] < 1.5 * apart["inductor"]
