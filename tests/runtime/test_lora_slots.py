"""Slots of adapters: who waits, who is swapped out, what must be brought in, and that nobody waits for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.artifacts.manifest import KVFacts, KVGroup
from llmc.errors import InternalError
from llmc.runtime.lora import LoraSlots
from llmc.runtime.messages import GenerateRequest, SamplingParams
from llmc.runtime.scheduler import Scheduler, SchedulerConfig
from llmc.runtime.scheduler.admission import MAX_OVERTAKING
from llmc.runtime.step import SampledToken, StepOutput, StepPlan

KV = KVFacts(block_size=4, dtype="float32", num_kv_heads=[1], head_dim=[8], groups=[KVGroup(layers=[0], window=0)])


def scheduler(max_loras: int, **options: int) -> Scheduler:
    limits = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": 4, "num_blocks": 64} | options
    return Scheduler(SchedulerConfig(**limits, max_loras=max_loras, max_num_partial_prefills=4), KV, secret=b"x")  # type: ignore[arg-type]


def ask(books: Scheduler, name: str, adapter: int, *, tokens: int = 2, at: float = 0.0, prompt: list[int] | None = None) -> None:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    request = GenerateRequest(request_id=name, prompt_token_ids=prompt or [1, 2, 3], sampling=sampling, arrival_time=at)
    books.add(request, adapter)


def step(books: Scheduler, lost: tuple[int, ...] = ()) -> StepPlan:
    plan = books.plan()
    books.check()
    failed = SampledToken(token_id=-1, error="not there")
    tokens = {s.request_id: failed if s.lora_slot in lost else SampledToken(token_id=5) for s in plan.sequences if s.samples}
    books.commit(StepOutput(step=plan.step, tokens=tokens, prompt_logprobs={}, lost_lora_slots=lost))
    books.check()
    return plan


def test_a_slot_is_kept_until_another_needs_it() -> None:
    slots = LoraSlots(2)
    assert (slots.acquire(7), slots.acquire(8), slots.acquire(7)) == (0, 1, 0)
    assert slots.take_loads() == ((0, 7), (1, 8)) and slots.take_loads() == ()
    assert not slots.can_acquire(9) and slots.can_acquire(8)
    slots.release(8)
    assert slots.can_acquire(9) and slots.acquire(8) == 1 and slots.take_loads() == ()
    slots.release(8)
    slots.release(7)
    slots.release(7)
    assert slots.acquire(9) == 0, "7 was taken up before 8 was"
    assert slots.acquire(8) == 1 and slots.take_loads() == ((0, 9),)


def test_books_that_disagree_are_noticed() -> None:
    slots = LoraSlots(1)
    slots.acquire(3)
    slots.check([3, 0])
    with pytest.raises(InternalError, match="counted"):
        slots.check([0])
    with pytest.raises(InternalError, match="while sequences of it run"):
        slots.forget(0)
    with pytest.raises(InternalError, match="without a free slot"):
        slots.acquire(4)


def test_requests_of_others_wait_and_the_models_own_go_past() -> None:
    books = scheduler(1)
    for at, (name, adapter) in enumerate([("a", 1), ("b", 2), ("base", 0), ("a2", 1)]):
        ask(books, name, adapter, at=float(at))
    first = step(books)
    assert {s.request_id: s.lora_slot for s in first.sequences} == {"a": 0, "base": -1, "a2": 0}
    assert first.lora_loads == ((0, 1),)
    assert [s.request_id for s in step(books).sequences] == ["a", "base", "a2"]
    third = step(books)
    assert [(s.request_id, s.lora_slot) for s in third.sequences] == [("b", 0)] and third.lora_loads == ((0, 2),)


def test_an_adapter_that_could_not_be_brought_is_brought_again() -> None:
    books = scheduler(2)
    ask(books, "a", 1)
    ask(books, "b", 2, at=1.0)
    assert step(books, lost=(0,)).lora_loads == ((0, 1), (1, 2))
    ask(books, "a2", 1, at=2.0)
    assert step(books).lora_loads == ((0, 1),)
    books.plan()
    books.fail_all("the step failed")
    books.check()
    ask(books, "b2", 2)
    assert step(books).lora_loads == ((0, 2),), "after a failed step nothing is said about what slots hold"


def test_nobody_is_overtaken_for_ever() -> None:
    books = scheduler(1)
    ask(books, "a", 1, tokens=3)
    step(books)
    ask(books, "b", 2, at=1.0)
    started = 0
    for turn in range(MAX_OVERTAKING + 20):  # there is always another request of the adapter that has the slot
        ask(books, f"a{turn}", 1, tokens=3, at=2.0 + turn)
        plan = step(books)
        started += sum(s.request_id.startswith("a") and s.start == 0 for s in plan.sequences)
        if any(s.request_id == "b" for s in plan.sequences):
            break
    else:
        raise AssertionError("b never ran")
    assert started <= MAX_OVERTAKING


def test_equal_prompts_of_two_adapters_share_no_block() -> None:
    books, prompt = scheduler(2), list(range(1, 18))
    for at, (name, adapter) in enumerate([("a", 1), ("b", 2), ("base", 0), ("again", 1)]):
        ask(books, name, adapter, tokens=1, at=float(at), prompt=prompt)
        (share,) = step(books).sequences
        assert share.start == (16 if name == "again" else 0)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), st.booleans()), max_size=30), st.integers(1, 3))
def test_any_mixture_ends_within_its_slots(requests: list[tuple[int, int, bool]], max_loras: int) -> None:
    books = scheduler(max_loras, num_blocks=12)
    for number, (adapter, tokens, go_on) in enumerate(requests):
        ask(books, str(number), adapter, tokens=tokens, at=float(number))
        if go_on:
            plan = step(books)
            assert len({s.lora_slot for s in plan.sequences} - {-1}) <= max_loras
    for _ in range(400):
        if not books.has_work():
            break
        assert step(books).sequences
    assert not books.has_work() and books.adapters() == (set(), set())
