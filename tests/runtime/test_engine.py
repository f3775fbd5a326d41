"""The engine in one process: same tokens whatever the batch, one bad sequence ends alone, limits resolved once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from llmc.artifacts.manifest import PoolingFacts
from llmc.errors import ConfigError, DeviceLost, InternalError, RequestRejected
from llmc.runtime.batch import BatchBuilder
from llmc.runtime.engine import EngineConfig
from llmc.runtime.engine_config import resolve
from llmc.runtime.messages import SamplingParams
from llmc.runtime.parallel.ranks import RanksExecutor
from llmc.runtime.pooling_runner import PoolingRunner
from llmc.runtime.step import DeviceBatch, ScheduledSequence, StepPlan
from tests.runtime.recall_executor import recall_engine, request, run_all, tokens_of
from tests.runtime.toy_artifact import toy_manifest
from tests.runtime.toy_program import VOCAB

PROMPTS = [[3, 4, 5], [7], [3, 4, 5, 6, 7, 8, 9, 10, 11], [2] * 21, [3, 4, 5, 6, 7, 8, 9, 12, 13], list(range(2, 30)), [9, 9], [30]]
MIXED = [
    {"seed": 7, "temperature": 0.9},
    {"seed": 8, "temperature": 1.3, "top_k": 7},
    {"temperature": 0.0},
    {"seed": 10, "top_p": 0.8, "repetition_penalty": 1.2},
    {"seed": 11, "min_p": 0.05, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"seed": 12, "min_tokens": 10, "logit_bias": {4: 3.0}},
    {"seed": 13, "allowed_token_ids": [3, 5, 7, 11, 13]},
    {"seed": 14, "bad_words_token_ids": [[4], [6, 7]]},
]


def _requests():
    return [request(str(i), prompt, max_tokens=14, **MIXED[i]) for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def alone() -> dict[str, list[int]]:
    """Each request in an engine of its own, without prefix cache."""
    return {one.request_id: tokens_of(run_all(recall_engine(enable_prefix_caching=False), [one])[one.request_id]) for one in _requests()}


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 8, "max_num_seqs": 8},
        {"num_blocks": 14, "reserve_blocks": 0},
        {"num_blocks": 14, "reserve_blocks": 0, "max_num_batched_tokens": 9, "enable_prefix_caching": False},
        {"max_num_seqs": 2},
    ],
    ids=["batched", "uncached", "chunked", "preempted", "preempted-chunked", "two-at-a-time"],
)
def test_tokens_depend_on_the_request_alone(alone, limits):
    engine = recall_engine(**limits)
    found = run_all(engine, _requests())
    assert {key: tokens_of(events) for key, events in found.items()} == alone
    again = run_all(engine, _requests())  # what the first round left in the prefix cache changes nothing
    assert {key: tokens_of(events) for key, events in again.items()} == alone
    if "num_blocks" in limits:
        assert engine.stats().num_preemptions > 0
    assert engine.stats().kv_blocks_used == 0


def test_windows_and_groups_give_the_same_tokens():
    def make(**limits):
        return recall_engine(windows=(0, 6), **limits)

    alone = {r.request_id: tokens_of(run_all(make(), [r])[r.request_id]) for r in _requests()}
    for limits in ({}, {"max_num_batched_tokens": 8}, {"num_blocks": 28, "reserve_blocks": 0}):
        assert {key: tokens_of(events) for key, events in run_all(make(**limits), _requests()).items()} == alone


def test_every_sequence_ends_exactly_once_and_nothing_is_kept():
    engine = recall_engine()
    events = run_all(engine, _requests())
    for one in events.values():
        assert [event.finish_reason is not None for event in one] == [False] * (len(one) - 1) + [True]
    assert engine._sampler._states == {}


def test_a_row_of_nan_ends_its_sequence_alone(alone):
    engine = recall_engine(poison=31)
    events = run_all(engine, [*_requests(), request("bad", [3, 31], temperature=0.0)])
    assert "no usable logits" in events["bad"][-1].error
    healthy = {key: tokens for key, tokens in alone.items() if 31 not in tokens[:-1]}
    assert healthy and all(tokens_of(events[key]) == tokens for key, tokens in healthy.items())


def test_a_sequence_that_breaks_the_program_ends_alone(alone):
    engine = recall_engine(explode=31)
    events = run_all(engine, [*_requests(), request("bad", [3, 31], temperature=0.0)])
    assert events["bad"][-1].finish_reason == "error" and "the kernel failed" in events["bad"][-1].error
    healthy = {key: tokens for key, tokens in alone.items() if 31 not in tokens[:-1]}
    assert healthy and all(tokens_of(events[key]) == tokens for key, tokens in healthy.items())


def test_prompt_logprobs_cover_the_prompt_whatever_the_chunks():
    whole = run_all(recall_engine(), [request("a", PROMPTS[5], temperature=0.0, max_tokens=1, prompt_logprobs=2, logprobs=1)])["a"][0]
    parts = run_all(
        recall_engine(max_num_batched_tokens=9), [request("a", PROMPTS[5], temperature=0.0, max_tokens=1, prompt_logprobs=2, logprobs=1)]
    )["a"][0]
    assert whole.prompt_logprobs[0] is None
    assert [entry.token_id for entry in whole.prompt_logprobs[1:]] == PROMPTS[5][1:]
    assert whole.prompt_logprobs == parts.prompt_logprobs and whole.logprobs == parts.logprobs


def test_abort_frees_and_says_so():
    engine = recall_engine()
    engine.add(request("a", [3, 4, 5], ignore_eos=True, max_tokens=100))
    engine.step()
    (event,) = engine.abort("a")
    assert event.finish_reason == "abort" and engine.stats().kv_blocks_used == 0 and not engine.has_work()
    assert engine.abort("a") == []


@pytest.mark.parametrize(
    ("prompt", "sampling", "param"),
    [
        ([3, VOCAB], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([], {}, "prompt"),
        ([2] * 128, {}, "prompt"),
        ([3], {"n": 2}, "n"),
        ([3], {"logprobs": 21}, "logprobs"),
        ([3], {"temperature": float("nan")}, "temperature"),
    ],
)
def test_bad_requests_are_rejected_by_name(prompt, sampling, param):
    engine = recall_engine()
    with pytest.raises(RequestRejected) as caught:
        engine.add(request("a", prompt, **sampling))
    assert caught.value.param == param and not engine.has_work()


class _Broken:
    """An executor, and a group, of which nothing is left."""

    def __init__(self, error):
        self.error, self.aborted = error, False

    def run(self, batch):
        raise self.error

    def abort(self):
        self.aborted = True


def test_a_lost_device_is_no_sequences_fault():
    builder = BatchBuilder(block_size=4, num_groups=1, vocab_size=VOCAB, max_num_batched_tokens=8, max_num_seqs=2, max_model_len=8)
    runner = PoolingRunner(_Broken(DeviceLost("gone")), builder, PoolingFacts(kind="last", normalize=True))
    share = ScheduledSequence(
        request_id="a",
        token_ids=[3, 4],
        num_prompt_tokens=2,
        start=0,
        end=2,
        block_ids=([0],),
        sampling=SamplingParams(),
        needs_prompt_logprobs=False,
    )
    with pytest.raises(DeviceLost, match="gone"):
        runner.submit(StepPlan(step=1, sequences=[share]))


@pytest.mark.parametrize("error", [InternalError("no"), MemoryError("no")])
def test_whatever_ends_the_step_of_one_rank_ends_it_on_all(error):
    broken, row = _Broken(error), np.zeros(1, dtype=np.int32)
    batch = DeviceBatch(**dict.fromkeys((field.name for field in dataclasses.fields(DeviceBatch)), row))
    with pytest.raises(DeviceLost, match="no longer run together"):
        RanksExecutor(broken, broken, 1, EngineConfig(artifact="none"), 1).run(batch)
    assert broken.aborted


def test_close_twice():
    engine = recall_engine()
    engine.close()
    engine.close()
    assert engine._executor.closed


def test_limits_may_be_lower_than_compiled_never_higher():
    manifest = toy_manifest()
    limits = resolve(EngineConfig(artifact="x", max_model_len=100, max_num_seqs=3), manifest, available_bytes=1 << 30)
    assert (limits.max_model_len, limits.max_num_seqs, limits.max_num_batched_tokens) == (100, 3, 64)
    assert limits.num_blocks == 3 * 7 + 1  # what three sequences of 100 tokens can use, no more
    with pytest.raises(ConfigError, match="max_model_len=257 is above the 256"):
        resolve(EngineConfig(artifact="x", max_model_len=257), manifest, available_bytes=1 << 30)


def test_blocks_fit_the_memory():
    one = 2 * 16 * 16 * 4
    limits = resolve(EngineConfig(artifact="x", kv_cache_memory_bytes=5 * one + 1), toy_manifest(), available_bytes=0)
    assert limits.num_blocks == 5
    limits = resolve(EngineConfig(artifact="x", memory_utilization=0.5), toy_manifest(), available_bytes=20 * one)
    assert limits.num_blocks == 10
    with pytest.raises(ConfigError, match="does not hold two KV blocks"):
        resolve(EngineConfig(artifact="x", kv_cache_memory_bytes=one), toy_manifest(), available_bytes=1 << 30)


@pytest.mark.parametrize(
    "fields", [{"threads": 0}, {"memory_utilization": 1.5}, {"num_blocks": 4, "kv_cache_memory_bytes": 10}, {"max_logprobs": -2}]
)
def test_wrong_settings_are_named(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        EngineConfig(artifact="x", **fields)
