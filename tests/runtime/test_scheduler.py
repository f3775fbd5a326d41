"""What a step holds: budget, order, admission, preemption, the prefix cache."""

from __future__ import annotations

import pytest

from llmc.errors import ConfigError, InternalError
from llmc.runtime.messages import TokenEvent
from llmc.runtime.scheduler import SchedulerConfig
from tests.runtime.scheduler_driver import finish, make_scheduler, output_for, request, shares, step


def test_prompt_then_one_token_a_step() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", 6, max_tokens=3))
    assert [shares(step(scheduler)[0]) for _ in range(3)] == [{"a": (0, 6)}, {"a": (6, 7)}, {"a": (7, 8)}]
    assert not scheduler.has_work()


def test_long_prompt_is_cut_into_chunks_and_samples_once() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", 40, max_tokens=1))
    steps = [step(scheduler) for _ in range(3)]
    assert [shares(plan) for plan, _ in steps] == [{"a": (0, 16)}, {"a": (16, 32)}, {"a": (32, 40)}]
    assert [len(events) for _, events in steps] == [0, 0, 1]


def test_decoding_sequences_are_served_before_prompts() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("old", 30, arrival=0))
    step(scheduler)
    scheduler.add(request("new", 1, arrival=1))
    step(scheduler)  # old [16, 30), new [0, 1)
    scheduler.add(request("long", 40, arrival=2))
    assert shares(step(scheduler)[0]) == {"old": (30, 31), "new": (1, 2), "long": (0, 14)}


def test_decode_is_sure_of_its_token_behind_a_better_ranked_prompt() -> None:
    scheduler = make_scheduler(policy="priority")
    scheduler.add(request("worse", 4, priority=5, arrival=0))
    step(scheduler)
    scheduler.add(request("better", 40, priority=0, arrival=1))
    step(scheduler)
    assert shares(step(scheduler)[0]) == {"better": (15, 30), "worse": (5, 6)}


def test_sequences_join_and_leave_between_steps() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for index in range(3):
        scheduler.add(request(f"r{index}", 4, arrival=index, max_tokens=2 + index))
    batches = []
    while scheduler.has_work():
        batches.append(sorted(shares(step(scheduler)[0])))
    assert batches == [["r0", "r1"], ["r0", "r1"], ["r1", "r2"], ["r2"], ["r2"], ["r2"]]


def test_long_prefill_threshold_leaves_room_for_others() -> None:
    scheduler = make_scheduler(long_prefill_token_threshold=6, max_num_partial_prefills=2)
    scheduler.add(request("a", 20, arrival=0))
    scheduler.add(request("b", 20, arrival=1))
    assert shares(step(scheduler)[0]) == {"a": (0, 6), "b": (0, 6)}


def test_partial_prefills_are_limited() -> None:
    scheduler = make_scheduler(long_prefill_token_threshold=6, max_num_partial_prefills=1)
    scheduler.add(request("a", 20, arrival=0))
    scheduler.add(request("b", 20, arrival=1))
    assert shares(step(scheduler)[0]) == {"a": (0, 6)}


def test_without_chunks_a_prompt_runs_whole_or_waits() -> None:
    scheduler = make_scheduler(enable_chunked_prefill=False)
    scheduler.add(request("a", 10, arrival=0, max_tokens=2))
    scheduler.add(request("b", 10, arrival=1, max_tokens=2))
    scheduler.add(request("c", 2, arrival=2, max_tokens=2))  # does not overtake b
    assert [shares(step(scheduler)[0]) for _ in range(2)] == [{"a": (0, 10)}, {"a": (10, 11), "b": (0, 10), "c": (0, 2)}]


def test_without_chunks_a_preempted_sequence_that_outgrew_the_budget_still_ends() -> None:
    scheduler = make_scheduler(enable_chunked_prefill=False, enable_prefix_caching=False, num_blocks=10, max_model_len=40)
    scheduler.add(request("a", 8, arrival=0, max_tokens=30))
    scheduler.add(request("b", 8, arrival=1, max_tokens=30))
    events = finish(scheduler)
    assert scheduler.stats().num_preemptions > 0
    assert {name: len(got) for name, got in events.items()} == {"a": 30, "b": 30}


def test_fcfs_ignores_priority_and_goes_by_arrival_then_id() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for name, arrival, priority in (("c", 1.0, 0), ("b", 1.0, 9), ("a", 2.0, -5)):
        scheduler.add(request(name, 4, arrival=arrival, priority=priority, max_tokens=1))
    assert [list(shares(step(scheduler)[0])) for _ in range(3)] == [["b"], ["c"], ["a"]]


def test_priority_goes_by_priority_then_arrival() -> None:
    scheduler = make_scheduler(max_num_seqs=1, policy="priority")
    for name, arrival, priority in (("c", 1.0, 0), ("b", 2.0, 0), ("a", 3.0, -5)):
        scheduler.add(request(name, 4, arrival=arrival, priority=priority, max_tokens=1))
    assert [list(shares(step(scheduler)[0])) for _ in range(3)] == [["a"], ["c"], ["b"]]


def test_nobody_overtakes_the_first_of_the_queue() -> None:
    scheduler = make_scheduler(num_blocks=8, max_model_len=32)
    scheduler.add(request("running", 12, arrival=0, max_tokens=8))
    step(scheduler)
    scheduler.add(request("large", 24, arrival=1, max_tokens=1))
    scheduler.add(request("small", 2, arrival=2, max_tokens=1))
    order: list[str] = []
    while scheduler.has_work():
        order += [name for name in shares(step(scheduler)[0]) if name not in order]
    assert order == ["running", "large", "small"]


def test_admission_keeps_a_reserve_while_others_run() -> None:
    for reserve, admitted in ((0, True), (3, False)):
        scheduler = make_scheduler(num_blocks=8, reserve_blocks=reserve, max_model_len=24)
        scheduler.add(request("a", 12, arrival=0))
        step(scheduler)
        scheduler.add(request("b", 12, arrival=1))
        assert ("b" in shares(step(scheduler)[0])) is admitted


def test_admission_leaves_half_computed_prompts_what_they_still_need() -> None:
    scheduler = make_scheduler(num_blocks=12, max_model_len=40, max_num_partial_prefills=4, long_prefill_token_threshold=8)
    scheduler.add(request("a", 36, arrival=0, max_tokens=1))
    scheduler.add(request("b", 16, arrival=1, max_tokens=1))  # 4 blocks are free now, but a will need 7 of the 10
    assert list(shares(step(scheduler)[0])) == ["a"]
    finish(scheduler)
    assert scheduler.stats().num_preemptions == 0


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_worst_ranked_sequence_gives_way_and_recomputes_the_same(policy: str) -> None:
    scheduler = make_scheduler(num_blocks=8, max_model_len=32, policy=policy)
    scheduler.add(request("a", 10, arrival=0, priority=1, max_tokens=20))
    scheduler.add(request("b", 10, arrival=1, priority=0, max_tokens=20))
    ended: list[str] = []
    events: dict[str, list[TokenEvent]] = {}
    while scheduler.has_work():
        for event in step(scheduler, lambda _, length: (length * 7) % 50)[1]:
            events.setdefault(event.request_id, []).append(event)
            ended += [event.request_id] if event.finish_reason else []
    assert ended == (["a", "b"] if policy == "fcfs" else ["b", "a"])
    assert scheduler.stats().num_preemptions > 0
    tokens = {name: [token for event in got for token in event.token_ids] for name, got in events.items()}
    assert tokens["a"] == tokens["b"]
    assert [got[-1].finish_reason for got in events.values()] == ["length", "length"]


def test_best_ranked_sequence_never_gives_way() -> None:
    scheduler = make_scheduler(num_blocks=8, max_model_len=32)
    for index in range(4):
        scheduler.add(request(f"r{index}", 6, arrival=index, max_tokens=20))
    for expected in range(6, 26):
        plan, _ = step(scheduler)
        assert plan.sequences[0].request_id == "r0"
        assert plan.sequences[0].end == expected


def test_nobody_is_admitted_in_a_step_that_preempted() -> None:
    scheduler = make_scheduler(num_blocks=8, max_model_len=32)
    scheduler.add(request("a", 14, arrival=0))
    scheduler.add(request("b", 2, arrival=0.5))
    scheduler.add(request("c", 14, arrival=1))
    before = 0
    while scheduler.has_work():
        running = {s.request_id for s in scheduler._running}
        plan, _ = step(scheduler)
        now = scheduler.stats().num_preemptions
        if now > before:
            assert set(shares(plan)) <= running
        before = now
    assert before > 0


def test_second_request_finds_the_first_ones_prefix() -> None:
    scheduler = make_scheduler()
    prompt = list(range(13))
    scheduler.add(request("a", prompt, max_tokens=1))
    finish(scheduler)
    scheduler.add(request("b", prompt, max_tokens=1))
    plan, events = step(scheduler)
    assert shares(plan) == {"b": (12, 13)}
    assert events[0].num_cached_tokens == 12
    assert (scheduler.stats().prefix_queries_tokens, scheduler.stats().prefix_hits_tokens) == (26, 12)


def test_whole_prompt_is_never_taken_from_the_cache() -> None:
    scheduler = make_scheduler()
    prompt = list(range(12))
    for name in ("a", "b"):
        scheduler.add(request(name, prompt, max_tokens=1))
        plan, _ = step(scheduler)
    assert shares(plan) == {"b": (8, 12)}


def test_generated_tokens_are_found_again_too() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", [1, 2, 3], max_tokens=6))
    finish(scheduler)
    scheduler.add(request("b", [1, 2, 3, 7, 7, 7, 7, 7, 7], max_tokens=1))
    assert shares(step(scheduler)[0]) == {"b": (8, 9)}


def test_copies_of_a_prompt_wait_one_step_for_the_first() -> None:
    scheduler = make_scheduler()
    prompt = list(range(10))
    for name in ("n-0", "n-1", "n-2"):
        scheduler.add(request(name, prompt, max_tokens=2))
    scheduler.add(request("other", 4, arrival=1, max_tokens=2))  # need not wait for them
    assert shares(step(scheduler)[0]) == {"n-0": (0, 10), "other": (0, 4)}
    assert shares(step(scheduler)[0]) == {"n-0": (10, 11), "n-1": (8, 10), "n-2": (8, 10), "other": (4, 5)}


def test_tenants_do_not_find_each_others_prefix() -> None:
    scheduler = make_scheduler()
    prompt = list(range(13))
    for name, salt in (("a", "one"), ("b", "two")):
        scheduler.add(request(name, prompt, salt=salt, max_tokens=1))
        plan, events = step(scheduler)
    assert shares(plan) == {"b": (0, 13)}
    assert events[0].num_cached_tokens == 0


def test_prefix_cache_off_or_reset_finds_nothing() -> None:
    prompt = list(range(13))
    for caching in (True, False):
        scheduler = make_scheduler(enable_prefix_caching=caching)
        scheduler.add(request("a", prompt, max_tokens=1))
        finish(scheduler)
        assert scheduler.reset_prefix_cache() == (3 if caching else 0)
        scheduler.add(request("b", prompt, max_tokens=1))
        assert shares(step(scheduler)[0]) == {"b": (0, 13)}


def test_sliding_window_holds_few_blocks() -> None:
    scheduler = make_scheduler(windows=(8,), num_blocks=8)
    scheduler.add(request("a", 40, max_tokens=20))
    most = 0
    while scheduler.has_work():
        plan, _ = step(scheduler)
        most = max(most, sum(block >= 0 for block in plan.sequences[0].block_ids[0]))
    assert most <= 7  # a chunk of 16 and 7 tokens before it


def test_plan_waits_for_commit() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a"))
    plan = scheduler.plan()
    with pytest.raises(InternalError, match="in flight"):
        scheduler.plan()
    scheduler.commit(output_for(plan))
    with pytest.raises(InternalError, match="commit each plan once"):
        scheduler.commit(output_for(plan))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be at least 1"),
        ({"max_num_seqs": 32}, "below max_num_seqs=32"),
        ({"policy": "lottery"}, "accepted: fcfs, priority"),
        ({"reserve_blocks": 64}, "leaves nothing of 64 blocks"),
        ({"max_model_len": 1}, "at least 2"),
        ({"long_prefill_token_threshold": -1}, "must be 0"),
        ({"long_prefill_token_threshold": 4, "enable_chunked_prefill": False}, "chunked prefill is off"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_scheduler(**changes)


def test_block_size_is_the_artifacts() -> None:
    scheduler = make_scheduler()
    config = SchedulerConfig(max_model_len=8, max_num_seqs=1, max_num_batched_tokens=8, block_size=8, num_blocks=16)
    with pytest.raises(ConfigError, match="differs from the artifact's 4"):
        type(scheduler)(config, scheduler._kv.facts)
