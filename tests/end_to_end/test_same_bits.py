"""A seeded request gets the same tokens, from the same bits of logits, whatever else the engine does at the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llmc import LLM, SamplingParams
from tests.end_to_end.served import Recorder, draw_prompts
from tests.end_to_end.workshop import Workshop

NEW_TOKENS = 32
SAMPLED = SamplingParams(
    temperature=1.0,
    top_p=0.9,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    repetition_penalty=1.1,
    seed=2024,
    max_tokens=NEW_TOKENS,
    ignore_eos=True,
    logprobs=5,
)
GENEROUS: dict[str, Any] = {"threads": 1, "max_num_seqs": 8, "max_num_batched_tokens": 256, "num_blocks": 128}
WORLDS = [("qwen3", torch.float32), ("qwen3", torch.bfloat16), ("demo", torch.float32), ("demo", torch.bfloat16)]
SUBJECT, *COMPANY = draw_prompts((45, 3, 60, 17, 32, 1, 25, 50), 512, 11)


@dataclass(frozen=True)
class Seen:
    """What a request got: its tokens, the bits of its log-probabilities, and those of the logits it was sampled from."""

    tokens: tuple[int, ...]
    logprobs: tuple[tuple[tuple[int, str], ...], ...]
    logits: bytes


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world[0]}-{str(world[1]).removeprefix('torch.')}")
def run(request: pytest.FixtureRequest, workshop: Workshop) -> Callable[..., Seen]:
    """Serve the subject under given conditions; what it got alone stands in `run.alone()`."""
    name, dtype = request.param
    artifact = workshop.artifact(name, dtype=dtype)

    def run(**conditions: Any) -> Seen:
        return _serve(artifact, **conditions)

    run.alone = cache(run)  # type: ignore[attr-defined]
    return run


def _blocks(prompts: list[list[int]]) -> int:
    """KV blocks that requests with these prompts hold at their end."""
    return sum(-(-(len(prompt) + NEW_TOKENS) // 16) for prompt in prompts)


def _serve(artifact: Path, company: int = 0, first: bool = True, warm: bool = False, preempted: bool | None = None, **options: Any) -> Seen:
    """The subject's result.

    Args:
        company: how many other requests run beside it.
        first: the subject is accepted before its company, else after it.
        warm: it ran before, so that its prompt is in the prefix cache.
        preempted: assert that it was recomputed at least once, or never.
        options: engine settings that differ from GENEROUS.
    """
    with LLM(artifact, **{**GENEROUS, **options}) as llm:
        if warm:
            llm.generate([SUBJECT], SAMPLED)
        recorder = Recorder()
        recorder.watch(llm)
        others = [(prompt, _others(row)) for row, prompt in enumerate(COMPANY[:company])]
        work = [(SUBJECT, SAMPLED), *others] if first else [*others, (SUBJECT, SAMPLED)]
        place = 0 if first else len(others)
        outputs = llm.generate([prompt for prompt, _ in work], [params for _, params in work])
        for output in outputs:
            assert output.outputs[0].error is None and len(output.outputs[0].token_ids) == NEW_TOKENS
        if warm and (first or _blocks([SUBJECT, *COMPANY[:company]]) <= options.get("num_blocks", GENEROUS["num_blocks"])):
            assert outputs[place].num_cached_tokens > 0  # else company may have taken the blocks before
        mine = outputs[place].request_id + ".0"
        if preempted is not None:
            again = [end - start for start, end in recorder.spans[mine][1:]]
            assert (max(again) > 1) is preempted, "the conditions do not test what they are to test"
        found = outputs[place].outputs[0]
        assert found.logprobs is not None
        bits = tuple(tuple((token, entry.logprob.hex()) for token, entry in table.items()) for table in found.logprobs)
        return Seen(tuple(found.token_ids), bits, np.stack(recorder.logits[mine]).tobytes())


def _others(row: int) -> SamplingParams:
    return SamplingParams(temperature=0.8, seed=row, max_tokens=NEW_TOKENS, ignore_eos=True)


CONDITIONS: dict[str, dict[str, Any]] = {
    "in a batch of 8": {"company": 7},
    "in a batch of 8, last": {"company": 7, "first": False},
    "in chunks of 8 tokens": {"max_num_batched_tokens": 8},
    "in chunks, in company": {"company": 7, "first": False, "max_num_batched_tokens": 13},
    "without a prefix cache": {"enable_prefix_caching": False},
    "from the prefix cache": {"warm": True},
    "from the prefix cache, in company": {"warm": True, "company": 7, "max_num_batched_tokens": 24},
    # four prompts fit, their answers do not: the last to come gives way
    "preempted": {"company": 3, "first": False, "num_blocks": 14, "preempted": True},
    "preempted, without a prefix cache": {
        "company": 3,
        "first": False,
        "num_blocks": 14,
        "preempted": True,
        "enable_prefix_caching": False,
    },
    "on two threads": {"threads": 2},
    "on two threads, in company": {"threads": 2, "company": 7, "max_num_batched_tokens": 24},
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_same_bits(run: Callable[..., Seen], condition: str) -> None:
    found, alone = run(**CONDITIONS[condition]), run.alone(preempted=False)  # type: ignore[attr-defined]
    assert found.tokens == alone.tokens
    assert found.logits == alone.logits
    assert found.logprobs == alone.logprobs


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    company=st.integers(0, 7),
    first=st.booleans(),
    warm=st.booleans(),
    max_num_batched_tokens=st.integers(8, 80),
    num_blocks=st.integers(12, 60),
    caching=st.booleans(),
    threads=st.integers(1, 2),
)
@example(company=3, first=False, warm=True, max_num_batched_tokens=8, num_blocks=12, caching=True, threads=1)  # company evicts its blocks
def test_same_bits_under_any_conditions(run: Callable[..., Seen], caching: bool, warm: bool, **conditions: Any) -> None:
    alone = run.alone(preempted=False)  # type: ignore[attr-defined]
    assert run(enable_prefix_caching=caching, warm=warm and caching, **conditions) == alone
