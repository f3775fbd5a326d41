"""Every supported architecture: the captured graph agrees with Hugging Face in fp32, over mixed prefill and decode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import llmc.kernels.ops  # noqa: F401  (registers the ops)
from llmc.compiler.capture import TracedModel, capture
from llmc.compiler.model import read_model
from tests.architectures import NAMES, VOCAB, save_tiny_model
from tests.compiler.paged_steps import PagedSteps
from tests.compiler.weights import load_constants, with_weights

PROMPT_LENGTHS = (21, 5, 37)
DECODE_STEPS = 4
TOLERANCE = 1e-4  # on logits of magnitude 2 to 5, fp32


@pytest.mark.parametrize("name", NAMES)
def test_captured_graph_agrees_with_hugging_face(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    reference = save_tiny_model(name, tmp_path)
    source = read_model(tmp_path)
    traced = capture(source, max_model_len=64)
    step = with_weights(traced.graph, load_constants(source, traced.constants))
    prompts, decoded = _tokens()
    expected = [_hugging_face(reference, prompt, tokens) for prompt, tokens in zip(prompts, decoded, strict=True)]
    found = _served(traced, step, prompts, decoded)
    for want, got in zip(expected, found, strict=True):
        torch.testing.assert_close(torch.stack(got), torch.stack(want), atol=TOLERANCE, rtol=0)


def _tokens() -> tuple[list[list[int]], list[list[int]]]:
    generator = torch.Generator().manual_seed(5)

    def draw(count: int) -> list[int]:
        return torch.randint(3, VOCAB - 3, (count,), generator=generator).tolist()

    return [draw(length) for length in PROMPT_LENGTHS], [draw(DECODE_STEPS) for _ in PROMPT_LENGTHS]


def _hugging_face(model: nn.Module, prompt: list[int], decoded: list[int]) -> list[Tensor]:
    cache, logits = DynamicCache(config=model.config), []
    with torch.no_grad():
        for tokens in [prompt, *([token] for token in decoded)]:
            output = model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True)
            logits.append(output.logits[0, -1])
    return logits


def _served(traced: TracedModel, step: nn.Module, prompts: list[list[int]], decoded: list[list[int]]) -> list[list[Tensor]]:
    """Prompt 0 alone, in chunks, the last of one token; the others with its first decode; then decodes together and alone."""
    steps = PagedSteps(traced.kv)
    found: list[list[Tensor]] = [[], [], []]
    steps.run(step, [(0, prompts[0][:9])])
    steps.run(step, [(0, prompts[0][9:-1])], padding=3)
    found[0].append(steps.run(step, [(0, prompts[0][-1:])])[0])
    mixed = steps.run(step, [(0, decoded[0][:1]), (1, prompts[1]), (2, prompts[2])], padding=2)
    for sequence in range(3):
        found[sequence].append(mixed[sequence])
    for index in range(DECODE_STEPS):
        if index + 1 < DECODE_STEPS:
            found[0].append(steps.run(step, [(0, [decoded[0][index + 1]])])[0])
        pair = steps.run(step, [(2, [decoded[2][index]]), (1, [decoded[1][index]])])
        found[2].append(pair[0])
        found[1].append(pair[1])
    return found
