"""Sampling on the GPU, and steps begun before the host knows the tokens of the step before: the very answers of a host that samples."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.errors import ArtifactError
from llmc.runtime.device_sampling import Fed, merge_fed
from llmc.runtime.engine import Engine, EngineConfig
from llmc.runtime.messages import GenerateRequest, SamplingParams, TokenEvent
from tests.cuda import toy_sampling as toy
from tests.cuda.stand_in import StandIn
from tests.cuda.toy_plans import SIZES, toy_plan, write_toy_plans
from tests.cuda.toy_sampling import NUM_TOP, NUM_TOUCHED
from tests.runtime.toy_program import DIM, VOCAB

Weights = dict[str, np.ndarray]
Use = Callable[..., StandIn]


@pytest.fixture(scope="module")
def weights() -> Weights:
    draw = np.random.default_rng(0)
    return {name: draw.normal(size=(VOCAB, DIM)).astype(np.float32) / 2 for name in ("embed", "head")}


@pytest.fixture(scope="module")
def artifact(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_plans(tmp_path_factory.mktemp("plans") / "device", weights)


@pytest.fixture(scope="module")
def plain(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without plans that sample."""
    return write_toy_plans(tmp_path_factory.mktemp("plans") / "host", weights, sampling=False)


@pytest.fixture
def use(stand_in: Callable[..., StandIn], monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    def choose(**knobs: int) -> StandIn:
        made = stand_in(**knobs)
        monkeypatch.setattr("llmc.runtime.cuda.driver.LIBRARY", str(made.path))
        return made

    yield choose


def engine_of(artifact: Path, **changes: Any) -> Engine:
    return Engine(EngineConfig(artifact=str(artifact), **{"num_blocks": 64, "threads": 1, "canary": False, **changes}))


def requests_of(settings: list[dict[str, Any]], seed: int = 1) -> list[GenerateRequest]:
    draw = random.Random(seed)
    return [
        GenerateRequest(
            request_id=str(number),
            prompt_token_ids=[draw.randrange(2, VOCAB) for _ in range(draw.choice([1, 2, 5, 9, 30]))],
            sampling=SamplingParams(**{"max_tokens": 14, "ignore_eos": True, "seed": number, **setting}),
        )
        for number, setting in enumerate(settings)
    ]


def answers(engine: Engine, requests: list[GenerateRequest], arrivals: dict[int, int] | None = None) -> dict[str, list[TokenEvent]]:
    """Every event by request; `arrivals`: request -> the step before which it comes."""
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    waiting, step = list(enumerate(requests)), 0
    while waiting or engine.has_work():
        for number, request in [one for one in waiting if (arrivals or {}).get(one[0], 0) <= step]:
            engine.add(request)
            waiting.remove((number, request))
        step += 1
        for event in engine.step():
            events[event.request_id].append(event)
            engine._scheduler.check()
    assert engine.stats().kv_blocks_used == 0 and engine._scheduler.num_in_flight == 0
    return events


def said(events: dict[str, list[TokenEvent]]) -> dict[str, tuple[list[int], Any, Any]]:
    """Tokens, the reason of the end, the error of each request."""
    return {
        name: ([token for event in made for token in event.token_ids], made[-1].finish_reason, made[-1].error)
        for name, made in events.items()
    }


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "greedy": [{"temperature": 0.0}] * 4,
    "drawn": [{"temperature": 0.7}, {"temperature": 1.5, "min_p": 0.05}, {"temperature": 0.0}, {"seed": -3}],
    "cut": [
        {"top_k": 3},
        {"top_p": 0.7},
        {"temperature": 0.0, "top_k": 2},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
        {},
    ],
    "changed": [
        {"logit_bias": {3: 4.0, 5: -2.0}},
        {"temperature": 0.0, "allowed_token_ids": [4, 7, 9]},
        {"min_tokens": 6, "stop_token_ids": list(range(2, 12))},
        {"bad_words_token_ids": [[6], [3, 4], [5, 5, 5]]},
        {"prompt": 1},
    ],
    "penalised": [
        {"repetition_penalty": 1.4, "max_tokens": 6},
        {"temperature": 0.0, "frequency_penalty": 0.8, "presence_penalty": 0.5, "max_tokens": 5},
        {"repetition_penalty": 0.8, "logit_bias": {3: 1.0}, "max_tokens": 4},
    ],
    "likely": [{"logprobs": 3}, {"logprobs": 0, "temperature": 0.0}, {}, {"logprobs": NUM_TOP, "top_k": 4}],
}
for one in SETTINGS["changed"]:
    one.pop("prompt", None)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_gpu_chooses_what_the_host_would(artifact: Path, plain: Path, use: Use, name: str) -> None:
    requests = requests_of(SETTINGS[name])
    if name == "penalised":  # tokens of the prompt count too
        requests = [r for r in requests if len(set(r.prompt_token_ids)) + (r.sampling.max_tokens or 0) < NUM_TOUCHED]
        assert len(requests) > 1
    driver = use()
    engine = engine_of(artifact)
    found, stats = answers(engine, requests), engine.stats()
    assert stats.steps_sampled_on_host == 0 < stats.steps_sampled_on_device
    assert (stats.steps_ahead > 0) == (name != "penalised" and name != "changed")
    assert driver.get("fed") >= stats.steps_ahead
    engine.close()
    assert (driver.get("live"), driver.get("graphs")) == (0, 0)
    use()
    host = engine_of(plain)
    expected = answers(host, requests)
    assert host.stats().steps_sampled_on_device == 0 == host.stats().steps_ahead
    host.close()
    assert said(found) == said(expected)
    for request in requests:
        for ours, theirs in zip(found[request.request_id], expected[request.request_id], strict=True):
            assert (ours.logprobs is None) == (theirs.logprobs is None) == (request.sampling.logprobs is None)
            for a, b in zip(ours.logprobs or [], theirs.logprobs or [], strict=True):
                assert (a.token_id, a.rank, [i for i, _ in a.top]) == (b.token_id, b.rank, [i for i, _ in b.top])
                assert abs(a.logprob - b.logprob) < 1e-5


def test_what_no_plan_holds_goes_by_the_logits_and_is_counted(artifact: Path, plain: Path, use: Use) -> None:
    many = dict.fromkeys(range(2, 3 + NUM_TOUCHED), 0.5)
    for setting in ({"logit_bias": many}, {"logprobs": NUM_TOP + 1}, {"prompt_logprobs": 1}):
        requests = requests_of([setting, {"temperature": 0.0}])
        use()
        engine = engine_of(artifact)
        found, stats = said(answers(engine, requests)), engine.stats()
        assert stats.steps_sampled_on_host > 0, setting
        engine.close()
        use()
        host = engine_of(plain)
        assert found == said(answers(host, requests))
        host.close()


def test_a_greedy_step_is_one_graph_and_brings_back_tokens(artifact: Path, use: Use) -> None:
    driver = use()
    engine = engine_of(artifact)
    answers(engine, requests_of([{"temperature": 0.0, "max_tokens": 20}] * 2))
    assert (driver.get("graph_launches"), driver.get("bytes_out")) == (engine.stats().step, 8 * 2 * engine.stats().step)
    assert engine.stats().steps_ahead >= 18
    engine.close()


def crowd(seed: int) -> tuple[list[GenerateRequest], dict[int, int]]:
    """Requests of all kinds that come while others run, and of which many end with a token nobody knew before."""
    draw = random.Random(seed)
    settings = []
    for _ in range(24):
        setting = dict(draw.choice([s for name in ("greedy", "drawn", "cut", "likely") for s in SETTINGS[name]]))
        setting |= {"max_tokens": draw.randint(1, 40), "stop_token_ids": draw.sample(range(2, VOCAB), 2)}
        settings.append(setting)
    return requests_of(settings, seed), {number: draw.randrange(60) for number in range(len(settings))}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("blocks", [64, 12])
def test_steps_ahead_change_no_answer(artifact: Path, plain: Path, use: Use, seed: int, blocks: int) -> None:
    requests, arrivals = crowd(seed)
    use(order=seed)
    engine = engine_of(artifact, num_blocks=blocks, max_num_seqs=5)
    found = said(answers(engine, requests, arrivals))
    stats = engine.stats()
    assert stats.steps_ahead > 10
    engine.close()
    use()
    host = engine_of(plain, num_blocks=blocks, max_num_seqs=5)
    assert found == said(answers(host, requests, arrivals))
    assert stats.generation_tokens == host.stats().generation_tokens
    host.close()
    assert {reason for _, reason, _ in found.values()} == {"stop", "length"}


def test_a_request_that_leaves_while_two_steps_run_takes_nothing_with_it(artifact: Path, plain: Path, use: Use) -> None:
    requests = requests_of([{"temperature": 0.9, "max_tokens": 30}] * 4)
    for leaves in range(2, 8):
        results = []
        for path in (artifact, plain):
            use()
            engine = engine_of(path)
            for request in requests:
                engine.add(request)
            made: dict[str, list[int]] = {request.request_id: [] for request in requests}
            step = 0
            while engine.has_work():
                step += 1
                for event in engine.step():
                    made[event.request_id] += event.token_ids
                if step == leaves:
                    engine.abort("1")
                    again = GenerateRequest(request_id="1", prompt_token_ids=[3, 4], sampling=SamplingParams(temperature=0.0, max_tokens=9))
                    made["1"] = []
                    engine.add(again)
                engine._scheduler.check()
            assert engine.stats().kv_blocks_used == 0
            results.append(made)
            engine.close()
        assert results[0] == results[1]


def test_a_row_that_masks_leave_nothing_of_is_the_requests_fault(artifact: Path, weights: Weights, use: Use) -> None:
    use()
    engine = engine_of(artifact)
    empty = {"allowed_token_ids": [5], "bad_words_token_ids": [[5]]}
    found = said(answers(engine, requests_of([empty, {"temperature": 0.0}])))
    assert "masks and biases leave no token" in found["0"][2] and len(found["1"][0]) == 14
    engine.close()


def test_a_step_that_fails_while_another_is_behind_it_ends_its_requests_and_the_engine_goes_on(
    artifact: Path, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    use()
    engine = engine_of(artifact)
    requests = requests_of([{"temperature": 0.0}] * 2)
    expected = said(answers(engine, requests))
    for request in requests:
        engine.add(request)
    for _ in range(3):
        engine.step()
    assert engine._scheduler.num_in_flight == 1
    with monkeypatch.context() as patch:
        patch.setattr(engine._executor, "finish", lambda: 1 / 0)
        ended = engine.step()
    assert [event.finish_reason for event in ended] == ["error", "error"] and engine._scheduler.num_in_flight == 0
    assert said(answers(engine, requests)) == expected
    engine.close()


def test_sampling_plans_that_do_not_fit_are_refused(weights: Weights, use: Use, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = use()
    with monkeypatch.context() as patch:
        patch.setitem(toy.WIDTHS, "touched_bias", NUM_TOUCHED + 1)
        wrong = write_toy_plans(tmp_path / "wrong", weights)
    with pytest.raises(ArtifactError, match="input touched_bias has 52 bytes, 48 are expected"):
        engine_of(wrong)
    with monkeypatch.context() as patch:
        patch.setitem(toy.OUTPUTS, "draw", ["fed_tokens", "ranks"])
        lacking = write_toy_plans(tmp_path / "lacking", weights)
    with pytest.raises(ArtifactError, match="tokens is nothing, int64 .1. is expected"):
        engine_of(lacking)
    every = toy.sampling_plans
    mixed = [(decode, toy_plan(decode, t, b, n)) for decode, t, b, n in SIZES]
    with monkeypatch.context() as patch:
        patch.setattr(toy, "sampling_plans", lambda rows, *rest: every(rows[:1], *rest))
        few = write_toy_plans(tmp_path / "few", weights, plans=mixed)
    with pytest.raises(ArtifactError, match="has no plan that checks 4 tokens"):
        engine_of(few)
    assert driver.get("live") == 0


def test_neighbouring_tokens_are_fed_in_one_copy() -> None:
    assert merge_fed([(0, 0), (1, 1), (3, 2), (4, 3), (5, 5)]) == [
        Fed(row=0, token=0, count=2),
        Fed(row=3, token=2, count=2),
        Fed(row=5, token=5, count=1),
    ]
