"""Sampling in Triton: the tokens of runtime/sampler for the same rows, seeds and positions; references; one row's bits in every batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmc.kernels.sample import reference as R
from llmc.kernels.sample.triton_impl import (
    adjust_logits,
    adjust_logits_reason,
    checked_tokens,
    sample,
    sample_reason,
    token_logprobs,
    token_logprobs_reason,
)
from llmc.runtime.messages import SamplingParams
from llmc.runtime.sampler import philox
from llmc.runtime.sampler.choose import choose
from llmc.runtime.sampler.logprobs import token_logprobs as host_logprobs

from .world import DEVICE, DTYPES, assert_close, poisoned, random, same_bits


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def parameters(settings: list[dict[str, Any]]) -> tuple[Tensor, ...]:
    """Tensors for `sample`, a row per setting."""
    params = [SamplingParams(**s) for s in settings]
    rows = [R.row_parameters(p.temperature, p.min_p) for p in params]
    made = (
        torch.tensor([r[0] for r in rows], dtype=torch.float32), torch.tensor([p.top_k for p in params], dtype=torch.int32),
        torch.tensor([p.top_p for p in params], dtype=torch.float64), torch.tensor([r[1] for r in rows], dtype=torch.float64),
        torch.tensor([p.seed or 0 for p in params]), torch.arange(len(params)) * 3,
    )  # fmt: skip
    return tuple(m.to(DEVICE) for m in made)


def host(logits: Tensor, settings: list[dict[str, Any]], first: int = 0) -> list[int]:
    """What runtime/sampler draws for rows that begin at row `first` of a batch."""
    tokens = []
    for i, (row, setting) in enumerate(zip(logits.float().cpu().numpy(), settings, strict=True)):
        p = SamplingParams(**setting)
        if p.temperature < 1e-5:
            tokens.append(int(row.argmax()))
        else:
            draw = philox.uniform(p.seed or 0, (first + i) * 3)
            tokens.append(choose(row, temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p, draw=draw))
    return tokens


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.3, "top_k": 5}, {"temperature": 1.7, "top_k": 1},
    {"temperature": 1.0, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.1}, {"temperature": 1.3, "top_p": 0.999, "top_k": 40},
    {"temperature": 1.0, "min_p": 0.2}, {"temperature": 2.0, "min_p": 1.0}, {"temperature": 0.8, "top_p": 0.6, "top_k": 7, "min_p": 0.01},
    {"temperature": 5.0, "top_k": 10000}, {"temperature": 1.0, "top_p": 1e-6},
]  # fmt: skip


@pytest.mark.parametrize("vocab, dtype", [(1, torch.float32), (37, torch.float16), (300, torch.bfloat16), (5000, torch.float32)])
def test_draws_what_the_host_draws(vocab: int, dtype: torch.dtype) -> None:
    settings = [s | {"seed": 1000 * i + 7} for i, s in enumerate(SETTINGS)]
    logits = random(len(settings), vocab, dtype=dtype, scale=3.0)
    if dtype != torch.float32:
        logits = logits.round()  # many equals
    with poisoned():
        found = sample(logits, *parameters(settings), True)
    assert found.tolist() == host(logits, settings)
    assert found.tolist() == R.sample_reference(logits, *parameters(settings), True).tolist()


def test_without_truncation_top_k_and_top_p_are_not_read() -> None:
    settings = [{"temperature": 0.9, "min_p": 0.05, "seed": i} for i in range(6)]
    logits = random(6, 5000, scale=3.0)
    given = parameters(settings)
    poison = (given[0], given[1] * 0 + 1, given[2] * 0, *given[3:])
    with poisoned():
        assert sample(logits, *poison, False).tolist() == host(logits, settings)


def test_the_stream_is_the_hosts() -> None:
    for seed in (0, 1, -5, 2**63 - 1, 12345678901234567):
        for position in (0, 1, 2**33):
            assert R.uniform(seed, position) == philox.uniform(seed, position)
    big = [2**62 + 11, -(2**40), 2**63 - 1, 5] * 2
    settings = [{"temperature": 1.0, "seed": seed} for seed in big]
    flat = torch.zeros(8, 4096, device=DEVICE)  # uniform weights: the token is the draw's first twelve bits
    assert sample(flat, *parameters(settings), False).tolist() == [int(philox.uniform(s, 3 * i) * 4096) for i, s in enumerate(big)]


def test_odd_rows() -> None:
    logits = random(7, 50)
    logits[0, 3], logits[1, 3] = float("nan"), float("inf")
    logits[2] = float("-inf")
    logits[3] = float("-inf")
    logits[3, [9, 41]] = 1.0  # nothing but two
    logits[4], logits[5] = 0.0, -0.0
    logits[5, 7] = 0.0
    settings = (
        [{"temperature": 1.0, "seed": 4}] * 3 + [{"temperature": 1.0, "top_k": 2, "top_p": 0.99, "seed": 9}] * 3 + [{"temperature": 0.0}]
    )
    found = sample(logits, *parameters(settings), True).tolist()
    assert found[:3] == [-1, -1, -1]
    assert found[3:] == host(logits[3:], settings[3:], first=3) and found[3] in (9, 41)
    assert found == R.sample_reference(logits, *parameters(settings), True).tolist()


def test_a_row_has_the_same_token_in_every_batch() -> None:
    logits, settings = random(4, 5000, dtype=torch.bfloat16, scale=2.0), [s | {"seed": 5} for s in SETTINGS[2:10:2]]
    given = parameters(settings)
    whole = sample(logits, *given, True)
    for rows in (slice(0, 1), slice(1, 4)):
        assert torch.equal(sample(logits[rows], *(g[rows].contiguous() for g in given), True), whole[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adjust(dtype: torch.dtype) -> None:
    logits, words = random(3, 5000, dtype=dtype), -(-5000 // 32)
    mask = torch.randint(-(2**31), 2**31, (3, words), dtype=torch.int64).to(torch.int32).to(DEVICE)
    ids = torch.stack([torch.randperm(5000)[:40] for _ in range(3)]).to(torch.int32).to(DEVICE)
    ids[1, 5:], ids[2] = -1, -1
    bias = random(3, 40)
    counts = torch.randint(-1, 4, (3, 40)).float().to(DEVICE)
    penalties = torch.tensor([[1.2, 0.5, 0.1], [0.7, -0.5, 0.0], [1.0, 0.0, 0.0]]).to(DEVICE)
    for allowed in (None, mask):
        with poisoned():
            found = adjust_logits(logits, allowed, ids, bias, counts, penalties)
        expected = R.adjust_logits_reference(logits, allowed, ids, bias, counts, penalties)
        assert torch.equal(found.isinf(), expected.isinf())
        assert_close(found.nan_to_num(neginf=-9.0), expected.nan_to_num(neginf=-9.0))


def test_adjust_is_what_the_host_does() -> None:
    from llmc.runtime.sampler.sampler import _penalise
    from llmc.runtime.sampler.token_counts import TokenCounts

    logits = random(1, 60)
    counts = TokenCounts([3, 5, 7])
    counts.advance([3, 5, 7, 5, 5, 9])
    row = logits[0].cpu().numpy().copy()
    row[[5, 20]] += np.asarray([0.5, -2.0], dtype=np.float32)
    _penalise(row, counts, SamplingParams(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=-0.2))
    ids = torch.tensor([[3, 5, 7, 9, 20]], dtype=torch.int32)
    bias, said = torch.tensor([[0, 0.5, 0, 0, -2.0]]), torch.tensor([[0.0, 2, 0, 1, -1]])
    given = (t.to(DEVICE) for t in (ids, bias, said, torch.tensor([[1.3, 0.4, -0.2]])))
    assert_close(adjust_logits(logits, None, *given), torch.from_numpy(row)[None])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs(dtype: torch.dtype) -> None:
    for vocab, num_top in ((1, 1), (40, 0), (40, 40 // 2), (5000, 5), (9000, 3)):
        logits = random(3, vocab, dtype=dtype, scale=2.0).mul(4).round().div(4)
        tokens = torch.tensor([0, vocab - 1, -1]).to(DEVICE)
        with poisoned():
            chosen, ranks, top_ids, top = token_logprobs(logits, tokens, num_top)
        expected = R.token_logprobs_reference(logits, tokens, num_top)
        assert torch.equal(ranks, expected[1]) and torch.equal(top_ids, expected[2])
        assert_close(chosen, expected[0])
        if num_top:
            assert_close(top, expected[3])
    theirs = host_logprobs(logits[1].float().cpu().numpy(), vocab - 1, 3)
    assert abs(theirs.logprob - float(chosen[1])) < 1e-5 and theirs.rank == int(ranks[1])
    assert [i for i, _ in theirs.top] == top_ids[1].tolist()


def test_logprobs_have_the_same_bits_in_every_batch() -> None:
    logits, tokens = random(5, 5000), torch.tensor([1, 2, 3, 4, 5]).to(DEVICE)
    whole = token_logprobs(logits, tokens, 4)
    assert same_bits(token_logprobs(logits[2:3], tokens[2:3].contiguous(), 4), [w[2:3] for w in whole])


def test_checked_tokens_stand_on_a_finite_logit() -> None:
    logits = random(6, 50)
    logits[1, 3], logits[2, 4], logits[3, 5] = math.nan, math.inf, -math.inf
    tokens = torch.tensor([7, 3, 4, 5, -1, 50]).to(DEVICE)
    with poisoned():
        found = checked_tokens(logits, tokens)
    assert found[0].tolist() == [7, -1, -1, -1, -1, -1] and found[1].tolist() == [7, 0, 0, 0, 0, 0]
    for one, expected in zip(found, R.checked_tokens_reference(logits, tokens), strict=True):
        assert torch.equal(one, expected)


def test_what_is_refused() -> None:
    given = parameters(SETTINGS[:1])
    assert "vocabulary of 300000" in str(sample_reason(torch.empty(1, 300000, device=DEVICE), *given, True))
    assert "contiguous" in str(sample_reason(random(9, 4).t(), *given, True))
    assert "33 logprobs" in str(token_logprobs_reason(random(1, 50), torch.zeros(1, dtype=torch.int64), 33))
    assert adjust_logits_reason(random(4, 4).t(), None, *(torch.zeros(4, 3),) * 4) is not None
    with pytest.raises(RuntimeError, match="top_p must be torch.float64"):
        R.check_sample(random(1, 4), given[0], given[1], given[2].float(), *given[3:])
    assert R.row_parameters(1e-6, 0.0) == (0.0, -math.inf)
