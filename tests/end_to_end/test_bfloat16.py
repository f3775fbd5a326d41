"""Every architecture in bf16: the logits of each step under forced tokens, and the demo model's own words.

The right answer is what the same weights give in fp32. Hugging Face in bf16 is some way from it; the served path may be a stated
multiple of that away (passes/tolerances.py), so the bar knows each architecture's own sensitivity. A mixture of experts jumps
where two experts tie; sequences in which rounding decides between experts have no right answer, and others are drawn.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmc import SamplingParams
from llmc.passes.tolerances import LOGITS
from tests.architectures import NAMES, VOCAB
from tests.end_to_end.served import SHORTEST_PROMPT, Recorder, generate
from tests.end_to_end.workshop import Workshop

QUICK = ("llama", "gemma3_text", "qwen3_moe")
PROMPT_LENGTHS = (5, 19, 12)
FORCED = 14
# Hugging Face's router logits, in fp32: bf16 rounds those near 1 by up to 0.004, and what it rounded before adds to that.
ROUTING_TIE = 0.012


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES])
def test_logits_of_each_step(name: str, workshop: Workshop) -> None:
    narrow = workshop.reference(name, torch.bfloat16)
    wide = copy.deepcopy(narrow).float()
    sequences = [clear_cut(wide, SHORTEST_PROMPT.get(name, 0) + length + FORCED, seed) for seed, length in enumerate(PROMPT_LENGTHS)]
    prompts = [sequence[:-FORCED] for sequence in sequences]
    recorder = Recorder(forced={f"{row}.0": sequence[-FORCED:] for row, sequence in enumerate(sequences)})
    params = SamplingParams(temperature=0.0, max_tokens=FORCED, ignore_eos=True)
    generate(workshop.artifact(name, dtype=torch.bfloat16), prompts, params, recorder=recorder)
    ours = torch.from_numpy(np.concatenate([np.stack(recorder.logits[f"{row}.0"]) for row in range(len(prompts))]))
    right, theirs = (torch.cat([_last(model, sequence) for sequence in sequences]) for model in (wide, narrow))
    allowed = LOGITS[torch.bfloat16]
    assert _rms(ours - right) <= allowed.rms * _rms(theirs - right)
    assert float((ours - right).abs().max()) <= allowed.largest * float((theirs - right).abs().max())


def clear_cut(wide: nn.Module, length: int, seed: int) -> list[int]:
    """A random sequence in which no choice of experts is close."""
    generator = np.random.default_rng(seed)
    for _ in range(200):
        sequence: list[int] = generator.integers(3, VOCAB, length).tolist()
        if _least_routing_margin(wide, sequence) > ROUTING_TIE:
            return sequence
    raise AssertionError("no sequence of 200 is free of ties between experts")


def _least_routing_margin(wide: nn.Module, sequence: list[int]) -> float:
    """Between the last expert chosen and the first that is not, over all layers and tokens; infinite without experts."""
    chosen = getattr(wide.config, "num_experts_per_tok", None)
    if chosen is None:
        return float("inf")
    with torch.no_grad():
        layers = wide(input_ids=torch.tensor([sequence]), output_router_logits=True).router_logits
    best = torch.cat([layer.reshape(-1, layer.shape[-1]) for layer in layers]).sort(dim=-1, descending=True).values
    return float((best[:, chosen - 1] - best[:, chosen]).min())


def _last(model: nn.Module, sequence: list[int]) -> Tensor:
    """float32 [FORCED, V]: the logits from which the forced tokens would be chosen."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([sequence])).logits[0]
    return logits[-FORCED - 1 : -1].float()


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


@pytest.mark.parametrize("level", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_demo_model_says_what_hugging_face_says(level: int, dtype: torch.dtype, workshop: Workshop) -> None:
    """Trained weights: greedy text after real prompts. In bf16 two right programs may part where two tokens are close."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(workshop.folder("demo") / "tokenizer.json"))
    texts = (
        "def fibonacci(n):",
        "import os\n\ndef walk(",
        "The ",
        'class Queue:\n    """Create a queue object',
        "for line in file:\n        ",
    )
    prompts = [tokenizer.encode(text).ids for text in texts]
    recorder = Recorder()
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    found = generate(workshop.artifact("demo", level=level, dtype=dtype), prompts, params, recorder=recorder)
    reference = workshop.reference("demo", dtype)
    tie = 1e-3 if dtype == torch.float32 else 0.25
    for row, (prompt, output) in enumerate(zip(prompts, found, strict=True)):
        tokens = output.outputs[0].token_ids
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
        ours = torch.from_numpy(np.stack(recorder.logits[f"{row}.0"]))
        best = logits.max(dim=-1)
        given_up = best.values - logits[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert float(given_up.max()) <= tie, f"prompt {row}, token {int(given_up.argmax())}"
        if dtype == torch.float32:
            torch.testing.assert_close(ours, logits, atol=1e-3, rtol=0)  # logits reach 20: nine bits more than 1e-3
            assert tokens == best.indices.tolist()
