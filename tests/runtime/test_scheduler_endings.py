"""Every accepted request ends exactly once, for the right reason; every other one is refused with a sentence."""

from __future__ import annotations

import pytest

from llmc.errors import RequestRejected
from llmc.runtime.messages import TokenLogprobs
from llmc.runtime.step import SampledToken, StepOutput
from tests.runtime.scheduler_driver import EOS, finish, make_scheduler, output_for, request, shares, step


def tokens_until_end(**sampling: object) -> tuple[list[int], str | None, int | None]:
    """Run one request of 4 tokens that samples 7, 8, EOS, 7, 8, EOS, ..."""
    scheduler = make_scheduler()
    scheduler.add(request("a", 4, **sampling))
    events = finish(scheduler, lambda _, length: (7, 8, EOS)[(length - 4) % 3])["a"]
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    return [token for event in events for token in event.token_ids], events[-1].finish_reason, events[-1].stop_token_id


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"max_tokens": 10}, ([7, 8, EOS], "stop", EOS)),
        ({"max_tokens": 2}, ([7, 8], "length", None)),
        ({"max_tokens": 3}, ([7, 8, EOS], "stop", EOS)),  # eos and the last token allowed: it stopped by itself
        ({"max_tokens": 4, "ignore_eos": True}, ([7, 8, EOS, 7], "length", None)),
        ({"max_tokens": 10, "min_tokens": 4}, ([7, 8, EOS, 7, 8, EOS], "stop", EOS)),
        ({"max_tokens": 10, "min_tokens": 3}, ([7, 8, EOS], "stop", EOS)),
        ({"max_tokens": 10, "stop_token_ids": [8]}, ([7, 8], "stop", 8)),
        ({"max_tokens": 10, "stop_token_ids": [8], "ignore_eos": True, "min_tokens": 3}, ([7, 8, EOS, 7, 8], "stop", 8)),
    ],
)
def test_finish_reasons(sampling: dict[str, object], expected: tuple[list[int], str, int | None]) -> None:
    assert tokens_until_end(**sampling) == expected


def test_sequence_ends_at_max_model_len() -> None:
    scheduler = make_scheduler(max_model_len=10)
    scheduler.add(request("a", 4, max_tokens=None))
    events = finish(scheduler)["a"]
    assert (len(events), events[-1].finish_reason) == (6, "length")


def test_pool_smaller_than_max_model_len_bounds_a_sequence() -> None:
    scheduler = make_scheduler(num_blocks=3)
    assert scheduler.max_sequence_tokens == 13  # 12 with K and V, and the last one, which needs none
    scheduler.add(request("a", 4, max_tokens=None))
    assert len(finish(scheduler)["a"]) == 9
    scheduler.add(request("b", 4, max_tokens=9))
    assert len(finish(scheduler)["b"]) == 9
    with pytest.raises(RequestRejected, match="a sequence of at most 13 tokens fits"):
        scheduler.add(request("c", 4, max_tokens=10))


@pytest.mark.parametrize(
    ("prompt", "sampling", "changes", "message"),
    [
        ([], {}, {}, "has no tokens"),
        ([1, -1], {}, {}, "is negative"),
        ([1, 2**40], {}, {}, "not an integer of at most 31 bits"),
        ([1, "2"], {}, {}, "not an integer"),
        (64, {}, {}, "has 64 tokens; at most 63 fit"),
        (17, {}, {"enable_chunked_prefill": False}, "without chunked prefill at most 16"),
        (4, {"max_tokens": 0}, {}, "max_tokens must be at least 1"),
        (20, {"max_tokens": None}, {"num_blocks": 4}, "more KV blocks than the pool's 4"),
    ],
)
def test_what_can_never_run_is_refused(
    prompt: int | list[int], sampling: dict[str, object], changes: dict[str, object], message: str
) -> None:
    scheduler = make_scheduler(**changes)
    with pytest.raises(RequestRejected, match=message) as caught:
        scheduler.add(request("a", prompt, **sampling))
    assert caught.value.status == 400
    assert not scheduler.has_work()
    scheduler.check()


def test_longest_prompt_that_fits_runs() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", 63))
    assert finish(scheduler)["a"][-1].finish_reason == "length"


def test_full_queue_answers_429() -> None:
    scheduler = make_scheduler(max_queue=2)
    for name in "abcdef":  # four may run at once, though none does yet
        scheduler.add(request(name, max_tokens=1))
    with pytest.raises(RequestRejected, match="6 requests are open") as caught:
        scheduler.add(request("g"))
    assert (caught.value.status, caught.value.code) == (429, "queue_full")
    step(scheduler)
    scheduler.add(request("g"))


def test_id_in_use_is_refused_and_free_again_after_the_end() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", max_tokens=1))
    with pytest.raises(RequestRejected, match="is in use"):
        scheduler.add(request("a"))
    finish(scheduler)
    scheduler.add(request("a"))


def test_abort_waiting_running_and_unknown() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(request("running", 8, arrival=0))
    scheduler.add(request("waiting", 8, arrival=1))
    step(scheduler)
    assert scheduler.stats().kv_blocks_used == 2
    for name in ("running", "waiting"):
        (event,) = scheduler.abort(name)
        assert (event.request_id, event.finish_reason, event.token_ids) == (name, "abort", [])
        assert scheduler.abort(name) == []
        scheduler.check()
    assert scheduler.abort("nobody") == []
    assert scheduler.stats().kv_blocks_used == 0
    assert not scheduler.has_work()


def test_stop_string_found_by_the_text_side_ends_with_stop() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a"))
    step(scheduler)
    assert scheduler.abort("a", "stop")[0].finish_reason == "stop"


def test_abort_while_the_step_is_in_flight_drops_its_token_alone() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", arrival=0))
    scheduler.add(request("b", arrival=1))
    plan = scheduler.plan()
    assert len(scheduler.abort("a")) == 1
    scheduler.add(request("a", arrival=2))  # the same id may come again at once
    events = scheduler.commit(output_for(plan))
    assert [event.request_id for event in events] == ["b"]
    assert shares(step(scheduler)[0]) == {"b": (4, 5), "a": (0, 4)}


def test_aborted_step_is_not_offered_to_the_prefix_cache() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", list(range(9))))
    plan = scheduler.plan()
    scheduler.abort("a")
    scheduler.commit(output_for(plan))
    scheduler.add(request("b", list(range(9))))
    assert shares(step(scheduler)[0]) == {"b": (0, 9)}


def test_when_a_sequence_left_the_queue_is_told_once() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", 8, max_tokens=3))
    told = [event.scheduled_at for _ in range(3) for event in step(scheduler)[1]]
    assert told == [12.5, 0.0, 0.0]


def test_one_request_fails_alone() -> None:
    scheduler = make_scheduler()
    for index, name in enumerate("abc"):
        scheduler.add(request(name, 8, arrival=index, max_tokens=2))
    plan = scheduler.plan()
    output = output_for(plan)
    output.tokens["b"] = SampledToken(token_id=-1, error="the model gave no usable logits")
    events = {event.request_id: event for event in scheduler.commit(output)}
    assert (events["b"].finish_reason, events["b"].error, events["b"].error_status) == ("error", "the model gave no usable logits", 500)
    rest = finish(scheduler)
    assert {name: got[-1].finish_reason for name, got in rest.items()} == {"a": "length", "c": "length"}


def test_poisoned_chunk_ends_a_prompt_and_is_not_cached() -> None:
    scheduler = make_scheduler()
    prompt = list(range(30))
    scheduler.add(request("a", prompt))
    plan = scheduler.plan()
    failed = StepOutput(step=plan.step, tokens={"a": SampledToken(token_id=-1, error="poisoned")}, prompt_logprobs={})
    (event,) = scheduler.commit(failed)
    assert event.finish_reason == "error"
    scheduler.add(request("b", prompt))
    assert shares(step(scheduler)[0]) == {"b": (0, 16)}


def test_missing_token_is_that_requests_error() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a"))
    plan = scheduler.plan()
    (event,) = scheduler.commit(StepOutput(step=plan.step, tokens={}, prompt_logprobs={}))
    assert event.finish_reason == "error"
    assert "no token" in (event.error or "")


def test_fail_all_ends_everything_and_the_engine_goes_on() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(request("a", arrival=0))
    scheduler.add(request("b", arrival=1))
    scheduler.plan()
    events = scheduler.fail_all("the step failed")
    assert [(event.request_id, event.finish_reason, event.error) for event in events] == [
        ("a", "error", "the step failed"),
        ("b", "error", "the step failed"),
    ]
    scheduler.check()
    assert scheduler.stats().kv_blocks_used == 0
    scheduler.add(request("c", max_tokens=1))
    assert finish(scheduler)["c"][-1].finish_reason == "length"


def test_prompt_logprobs_come_once_with_the_first_token() -> None:
    scheduler = make_scheduler()
    prompt = list(range(100, 140))
    scheduler.add(request("warm", prompt, max_tokens=1))
    finish(scheduler)
    scheduler.add(request("a", prompt, max_tokens=2, prompt_logprobs=0))
    plans = []
    events = []
    while scheduler.has_work():
        plan, got = step(scheduler)
        plans.append((shares(plan)["a"], plan.sequences[0].needs_prompt_logprobs))
        events += got
    assert plans == [((0, 16), True), ((16, 32), True), ((32, 40), True), ((40, 41), False)]
    found = events[0].prompt_logprobs
    assert found is not None
    assert [entry and entry.token_id for entry in found] == [None, *prompt[1:]]
    assert events[1].prompt_logprobs is None
    assert events[0].num_cached_tokens == 0


def test_too_few_prompt_logprobs_are_that_requests_error() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", 4, prompt_logprobs=0))
    plan = scheduler.plan()
    output = StepOutput(step=plan.step, tokens={"a": SampledToken(token_id=7)}, prompt_logprobs={})
    (event,) = scheduler.commit(output)
    assert event.finish_reason == "error"
    assert "0 prompt log-probabilities instead of 3" in (event.error or "")


def test_logprobs_and_cached_tokens_travel_with_their_events() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", list(range(9)), max_tokens=1))
    finish(scheduler)
    scheduler.add(request("b", list(range(9)), max_tokens=2, logprobs=0))
    logprobs = TokenLogprobs(token_id=7, logprob=-0.5, rank=1, top=[])
    events = []
    while scheduler.has_work():
        plan = scheduler.plan()
        sampled = {"b": SampledToken(token_id=7, logprobs=logprobs)}
        events += scheduler.commit(StepOutput(step=plan.step, tokens=sampled, prompt_logprobs={}))
    assert [event.logprobs for event in events] == [[logprobs], [logprobs]]
    assert [event.num_cached_tokens for event in events] == [8, 0]


def test_stats_count() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(request("a", 8, arrival=0, max_tokens=3))
    scheduler.add(request("b", 8, arrival=1, max_tokens=3))
    step(scheduler)
    stats = scheduler.stats()
    assert (stats.step, stats.time, stats.num_running, stats.num_waiting) == (1, 12.5, 1, 1)
    assert (stats.kv_blocks_used, stats.kv_blocks_total) == (2, 64)
    finish(scheduler)
    stats = scheduler.stats()
    assert (stats.prompt_tokens, stats.generation_tokens, stats.num_running, stats.num_waiting) == (16, 6, 0, 0)
