"""Plans through the whole runtime answer as Hugging Face does, in fp32: on the stand-in, their kernels in Triton's interpreter.

Prompts run together through the scheduler, over the paged cache: the step's budget cuts them into chunks, and while one is read others
decode. Graphs run in a random order that their edges allow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="needs the cuda extra: pip install 'llmc[cuda]'")

from llmc import SamplingParams
from tests.architectures import VOCAB, save_tiny_model
from tests.cuda.interpreted import Interpreter, compile_recorded
from tests.cuda.served import HEAVY, Served, environment
from tests.cuda.stand_in import StandIn
from tests.end_to_end.served import Continuation, Recorder, continuation, draw_prompts, generate
from tests.server.tiny_tokenizers import byte_level_json

TOLERANCE = 1e-5  # on fp32 logits; Gemma 3's own rounding in fp32 is 2.5e-5, the others' 1.5e-6
NEW_TOKENS = 5
PROMPT_LENGTHS = (1, 9, 12, 20)
SIZES = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16, "cudagraph_capture_sizes": (2, 4), "compile_sizes": (16,)}
MIXED = ("gemma3_text", "gpt_oss")  # models that name the kind of each layer
SLOW = ("llama", "gemma3_text")


def clear_cut(reference: nn.Module) -> tuple[list[list[int]], list[Continuation]]:
    """Prompts whose greedy continuation rounding cannot change, and the continuations."""
    for seed in range(20):
        prompts = draw_prompts(PROMPT_LENGTHS, VOCAB, seed)
        expected = [continuation(reference, prompt, NEW_TOKENS) for prompt in prompts]
        if min(one.least_margin for one in expected) > 2 * TOLERANCE:
            return prompts, expected
    raise AssertionError("the model's logits are too flat")


def own_rounding(reference: nn.Module, prompts: list[list[int]], expected: list[Continuation]) -> float:
    """How far Hugging Face's fp32 logits are from its own in fp64: where that is more than TOLERANCE, nothing can agree to TOLERANCE."""
    precise = copy.deepcopy(reference).double()
    precise.set_experts_implementation("eager")  # torch's grouped products know no fp64
    worst = 0.0
    for prompt, want in zip(prompts, expected, strict=True):
        ids = torch.tensor([prompt + want.tokens[:-1]])
        with torch.no_grad():
            logits = precise(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
        worst = max(worst, float((want.logits.double() - logits).abs().max()))
    return worst


@dataclass(frozen=True)
class Work:
    """An artifact, the process that runs its kernels, and what it is expected to say."""

    artifact: Path
    interpreter: Interpreter
    prompts: list[list[int]]
    expected: list[Continuation]
    tolerance: float  # on fp32 logits


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Work]]:
    """Makes each model's once."""
    made: dict[str, Work] = {}

    def make(name: str) -> Work:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            layers = {} if name in MIXED else {"num_hidden_layers": 2}
            (folder / "model").mkdir()
            (folder / "model" / "tokenizer.json").write_bytes(byte_level_json())  # without which nothing is served
            reference = save_tiny_model(name, folder / "model", torch.float32, **layers)
            prompts, expected = clear_cut(reference)
            tolerance = max(TOLERANCE, own_rounding(reference, prompts, expected))
            sources = compile_recorded(folder / "model", folder / "out", dtype="float32", **SIZES)
            made[name] = Work(folder / "out", Interpreter(sources), prompts, expected, tolerance)
        return made[name]

    yield make
    for one in made.values():
        one.interpreter.close()


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ("qwen3", *SLOW)])
def test_plans_answer_as_hugging_face(
    name: str, work: Callable[[str], Work], libcuda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = work(name)
    prompts, expected = made.prompts, made.expected
    driver = StandIn(libcuda, tmp_path, made.interpreter.path)
    driver.set(order=5)
    monkeypatch.setattr("llmc.runtime.cuda.driver.LIBRARY", str(driver.path))
    recorder = Recorder()
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=1)  # which the sampler looks at row by row
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "num_blocks": 40}
    found = generate(made.artifact, prompts, params, recorder=recorder, **limits)
    assert recorder.mixed and recorder.spans["3.0"][0][0] > 0, "nothing was chunked, or no step was mixed"
    for row, (output, want) in enumerate(zip(found, expected, strict=True)):
        assert output.outputs[0].token_ids == want.tokens
        logits = torch.from_numpy(np.stack(recorder.logits[f"{row}.0"]))
        torch.testing.assert_close(logits, want.logits, atol=made.tolerance, rtol=0)
    assert (driver.get("live"), driver.get("graphs"), driver.get("modules")) == (0, 0, 0)


@pytest.mark.slow
def test_a_served_model_says_what_hugging_face_says(work: Callable[[str], Work], libcuda: Path, tmp_path: Path) -> None:
    made = work("qwen3")
    known = environment(libcuda, made.interpreter.path, order=7)
    with Served(made.artifact, tmp_path, known, "--num-gpu-blocks-override", "40") as served:
        with ThreadPoolExecutor(len(made.prompts)) as pool:
            asked = {"max_tokens": NEW_TOKENS, "ignore_eos": True, "return_token_ids": True}
            replies = list(pool.map(lambda prompt: served.complete(prompt, **asked).json(), made.prompts))
        assert [reply["choices"][0]["token_ids"] for reply in replies] == [want.tokens for want in made.expected]
        engine = served.engine
        assert served.stop() == 0
        assert not HEAVY & served.modules()[engine]
