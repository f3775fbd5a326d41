"""Answers of plans in fp32 held against Hugging Face's: prompts together through the scheduler, chunks and decodes in one step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llmc import SamplingParams
from tests.architectures import VOCAB, tiny_model
from tests.end_to_end.served import Continuation, Recorder, continuation, draw_prompts, generate
from tests.server.tiny_tokenizers import byte_level_json

TOLERANCE = 1e-5  # on fp32 logits of up to 5; Hugging Face's fp32 and ours are each some 1e-6 from its fp64
NEW_TOKENS = 5
PROMPT_LENGTHS = (1, 9, 12, 20)
SIZES: dict[str, Any] = {
    "max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16, "cudagraph_capture_sizes": (2, 4), "compile_sizes": (16,),
}  # fmt: skip
ARCHITECTURES = ("qwen3", "llama", "gemma3_text", "gpt_oss", "qwen3_moe")
_MIXED = ("gemma3_text", "gpt_oss")  # models that name the kind of each layer


def save_model(name: str, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A tiny model with a tokenizer, without which nothing is served."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(byte_level_json())
    layers = {} if name in _MIXED else {"num_hidden_layers": 2}
    model = tiny_model(name, dtype, **layers)
    if name.startswith("gemma"):
        # Gemma's norms multiply by 1 + weight, and the tiny models' weights are near 1. With factors of 2 attention scores are four
        # times as large as elsewhere, and Hugging Face's fp32 logits 1.4e-5 from its fp64 ones (ours 1.0e-5), against 1e-6 at 1.
        with torch.no_grad():
            for weight in (weight for place, weight in model.named_parameters() if place.endswith("norm.weight")):
                weight.sub_(1.0)
    model.save_pretrained(folder)  # type: ignore[operator]
    return model


def clear_cut(reference: nn.Module) -> tuple[list[list[int]], list[Continuation]]:
    """Prompts whose greedy continuation rounding cannot change, and the continuations."""
    for seed in range(20):
        prompts = draw_prompts(PROMPT_LENGTHS, VOCAB, seed)
        expected = [continuation(reference, prompt, NEW_TOKENS) for prompt in prompts]
        if min(one.least_margin for one in expected) > 2 * TOLERANCE:
            return prompts, expected
    raise AssertionError("the model's logits are too flat")


def assert_answers(artifact: Path, prompts: Sequence[list[int]], expected: Sequence[Continuation]) -> None:
    """The plans' greedy tokens are the expected ones, and their logits within TOLERANCE, with chunked prompts and mixed steps."""
    recorder = Recorder()
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=1)  # which the sampler looks at row by row
    found = generate(artifact, prompts, params, recorder=recorder, max_num_seqs=4, max_num_batched_tokens=16, num_blocks=40)
    assert recorder.mixed and recorder.spans["3.0"][0][0] > 0, "nothing was chunked, or no step was mixed"
    for row, (output, want) in enumerate(zip(found, expected, strict=True)):
        assert output.outputs[0].token_ids == want.tokens
        logits = torch.from_numpy(np.stack(recorder.logits[f"{row}.0"]))
        torch.testing.assert_close(logits, want.logits, atol=TOLERANCE, rtol=0)
