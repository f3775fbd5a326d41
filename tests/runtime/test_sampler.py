"""The sampler against simple oracles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.runtime.messages import SamplingParams
from llmc.runtime.sampler import Sampler
from llmc.runtime.sampler.choose import choose
from llmc.runtime.sampler.logprobs import token_logprobs, top_ids
from llmc.runtime.sampler.philox import philox_4x32, uniform, uniforms
from llmc.runtime.step import ScheduledSequence

V = 37


def _sequence(output: list[int] | None = None, prompt: list[int] | None = None, request_id: str = "a", **sampling) -> ScheduledSequence:
    prompt = prompt if prompt is not None else [1, 2, 3]
    token_ids = [*prompt, *(output or [])]
    return ScheduledSequence(
        request_id=request_id,
        token_ids=token_ids,
        num_prompt_tokens=len(prompt),
        start=len(token_ids) - 1,
        end=len(token_ids),
        block_ids=([0],),
        sampling=SamplingParams(**sampling),
        needs_prompt_logprobs=False,
    )


def _row(seed: int, size: int = V) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32) * 3


def _sample(row: np.ndarray, **kwargs) -> int:
    sampled = Sampler(eos_token_ids=[0]).sample(row.copy(), _sequence(**kwargs))
    assert sampled.error is None
    return sampled.token_id


def test_philox_known_answers():
    """Random123's kat_vectors, philox4x32 10 rounds."""
    assert philox_4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert philox_4x32((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


def test_uniform_is_uniform():
    draws = np.array([uniform(seed, position) for seed in range(-20, 20) for position in range(250)])
    assert draws.min() >= 0 and draws.max() < 1
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert ((counts - 500) ** 2 / 500).sum() < 45  # chi square, 19 degrees of freedom, p = 0.0007


@given(st.lists(st.tuples(st.integers(), st.integers(0, 2**33)), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_draws_made_together_are_those_made_alone(pairs):
    found = uniforms([seed for seed, _ in pairs], [position for _, position in pairs], 5)
    assert found.tolist() == [[uniform(seed, position + ahead) for ahead in range(5)] for seed, position in pairs]


def test_greedy_takes_the_lowest_of_equals():
    row = np.zeros(V, dtype=np.float32)
    row[[9, 20]] = 5
    assert _sample(row, temperature=0.0) == 9


def _oracle_kept(row: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """Token -> probability by the definitions, in float64, one sort for everything."""
    p = np.exp((row.astype(np.float64) - row.max()) / temperature)
    p /= p.sum()
    keep = p >= min_p * p.max() * (1 - 1e-6)
    if top_k > 0:
        keep &= row >= np.sort(row)[-min(top_k, len(row))]
    p = np.where(keep, p, 0)
    p /= p.sum()
    order = np.argsort(-row, kind="stable")
    kept, reached = {}, 0.0
    for token in order:
        if reached >= top_p or p[token] == 0:
            break
        kept[int(token)] = p[token]
        reached += p[token]
    total = sum(kept.values())
    return {token: value / total for token, value in kept.items()}


@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, -1, 1, 5, 36, 100]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_the_whole_distribution_matches_the_definition(seed, temperature, top_k, top_p, min_p):
    row = _row(seed)
    expected = _oracle_kept(row, temperature, top_k, top_p, min_p)
    grid = (np.arange(400) + 0.5) / 400  # the inverse transform, walked through evenly: each token gets its share of the grid
    found = [choose(row, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, draw=float(draw)) for draw in grid]
    shares = {token: found.count(token) / len(grid) for token in set(found)}
    for token in set(expected) | set(shares):
        assert abs(shares.get(token, 0) - expected.get(token, 0)) <= 1.01 / 400 + 1e-5, token


@pytest.mark.parametrize("size", [1, 511, 512, 513, 5000])
def test_draws_reach_every_token(size):
    row = np.zeros(size, dtype=np.float32)
    found = {choose(row, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, draw=(i + 0.5) / size) for i in range(size)}
    assert found == set(range(size))
    assert choose(row, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, draw=1 - 2**-53) == size - 1


def test_impossible_tokens_are_never_drawn():
    row = np.full(V, -np.inf, dtype=np.float32)
    row[[4, 8]] = [0.0, 1.0]
    for draw in (0.0, 0.3, 1 - 2**-53):
        assert choose(row, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, draw=draw) in (4, 8)
        assert choose(row, temperature=1.0, top_k=20, top_p=0.99, min_p=0.0, draw=draw) in (4, 8)


def test_a_flat_nucleus_beyond_the_first_guess():
    row = np.zeros(4000, dtype=np.float32)
    found = {choose(row, temperature=1.0, top_k=0, top_p=0.75, min_p=0.0, draw=(i + 0.5) / 4000) for i in range(4000)}
    assert found == set(range(3000))


def test_penalties_as_defined():
    row, output = _row(3), [5, 5, 7, 2]
    expected = row.astype(np.float64)
    for token in {1, 2, 3, 5, 7}:
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    for token, count in ((5, 2), (7, 1), (2, 1)):
        expected[token] -= 0.7 * count + 0.4
    changed = row.copy()
    Sampler(eos_token_ids=[0]).sample(
        changed, _sequence(output, temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.7, presence_penalty=0.4)
    )
    np.testing.assert_allclose(changed, expected, rtol=1e-5)


def test_penalties_grow_with_the_output_as_if_counted_anew():
    sampler, output = Sampler(eos_token_ids=[0]), []
    for step in range(150):
        row = _row(step)
        fresh = _sample(row, output=list(output), temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.2)
        kept = sampler.sample(row.copy(), _sequence(list(output), temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.2)).token_id
        assert kept == fresh
        output.append(kept)


def test_bias_masks_and_words():
    row = _row(5)
    best = int(row.argmax())
    assert _sample(row, temperature=0.0, logit_bias={11: 100.0}) == 11
    assert _sample(row, temperature=0.0, allowed_token_ids=[6]) == 6
    assert _sample(row, temperature=0.0, bad_words_token_ids=[[best]]) != best
    assert _sample(row, output=[9], temperature=0.0, bad_words_token_ids=[[9, best]]) != best
    assert _sample(row, output=[8], temperature=0.0, bad_words_token_ids=[[9, best]]) == best
    assert _sample(row, prompt=[9], temperature=0.0, bad_words_token_ids=[[9, best]]) == best  # only the output counts


def test_min_tokens_holds_back_eos_and_stop_tokens():
    row = np.zeros(V, dtype=np.float32)
    row[[0, 4, 6]] = [9, 8, 7]
    assert _sample(row, temperature=0.0, min_tokens=2, stop_token_ids=[4]) == 6
    assert _sample(row, output=[3, 3], temperature=0.0, min_tokens=2, stop_token_ids=[4]) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_row_is_an_error(value):
    row = _row(1)
    row[3] = value
    for params in ({"temperature": 0.0}, {"seed": 1}, {"temperature": 0.0, "logprobs": 1}):
        assert "no usable logits" in Sampler(eos_token_ids=[]).sample(row.copy(), _sequence(**params)).error


def test_masks_that_leave_nothing_are_an_error():
    sampled = Sampler(eos_token_ids=[]).sample(_row(1), _sequence(allowed_token_ids=[4], bad_words_token_ids=[[4]]))
    assert "leave no token" in sampled.error


def test_logprobs_are_of_the_raw_logits():
    row = _row(8)
    sampled = Sampler(eos_token_ids=[]).sample(row.copy(), _sequence(temperature=0.0, logit_bias={11: 50.0}, logprobs=3))
    wide = row.astype(np.float64)
    expected = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    assert sampled.token_id == 11
    assert sampled.logprobs.logprob == pytest.approx(expected[11], abs=1e-5)
    assert sampled.logprobs.rank == 1 + int((row > row[11]).sum())
    assert [token for token, _ in sampled.logprobs.top] == list(np.argsort(-row, kind="stable")[:3])
    assert [value for _, value in sampled.logprobs.top] == pytest.approx(np.sort(expected)[::-1][:3], abs=1e-5)


def test_top_ids_with_ties_and_edges():
    row = np.array([1, 3, 3, 2], dtype=np.float32)
    assert list(top_ids(row, 3)) == [1, 2, 3]
    assert list(top_ids(row, 99)) == [1, 2, 3, 0]
    assert token_logprobs(row, 0, 0).top == []


def test_seeded_draws_depend_on_seed_and_position_alone():
    row = _row(2)
    tokens = [_sample(row, output=[9] * n, seed=5) for n in range(40)]
    shared = Sampler(eos_token_ids=[0], seed=99)
    for n in reversed(range(40)):  # another order, other sequences in between
        shared.sample(row.copy(), _sequence(request_id=f"other-{n}"))
        assert shared.sample(row.copy(), _sequence([9] * n, request_id="x", seed=5)).token_id == tokens[n]
    assert len(set(tokens)) > 3
    assert tokens != [_sample(row, output=[9] * n, seed=6) for n in range(40)]


def test_unseeded_sequences_differ_and_stay_themselves():
    row = _row(2)
    sampler = Sampler(eos_token_ids=[0])
    runs = [[sampler.sample(row.copy(), _sequence([9] * n, request_id=str(i))).token_id for n in range(20)] for i in range(3)]
    assert len({tuple(run) for run in runs}) == 3
    assert [sampler.sample(row.copy(), _sequence([9] * n, request_id="1")).token_id for n in range(20)] == runs[1]
    sampler.forget("1")
    assert "1" not in sampler._states
