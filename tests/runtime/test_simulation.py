"""The seeded simulation itself, and proof that it sees planted faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llmc.runtime.kv import BlockPool, KVManager, PrefixCache, prefix_cache
from llmc.runtime.messages import TokenEvent
from llmc.runtime.scheduler import Scheduler, scheduler
from llmc.runtime.scheduler.request import Sequence
from llmc.runtime.step import SampledToken
from tests.runtime.simulation import FakeRunner, SimulationError, simulate

STEPS_IN_SUITE = 100_000
SEEDS = (1, 2, 3, 4)


@pytest.mark.parametrize("seed", SEEDS)
def test_invariants_hold_over_random_lives(seed: int) -> None:
    totals = simulate(STEPS_IN_SUITE // len(SEEDS), seed=seed)
    # The corners must have been reached, or the result says little.
    assert totals.preemptions > 100
    assert totals.cached_tokens > 1000
    assert totals.windows_moved > 1000
    assert min(totals.aborts, totals.errors, totals.rejections) > 100
    assert totals.largest_batch == 8
    assert totals.drafts > 1000 and totals.drafts > totals.accepted > 500


def test_same_seed_gives_the_same_life() -> None:
    assert simulate(500, seed=9) == simulate(500, seed=9)


def _tenants_share(monkeypatch: pytest.MonkeyPatch) -> None:
    root = PrefixCache.root
    monkeypatch.setattr(PrefixCache, "root", lambda self, salt: root(self, ""))


def _window_gives_back_one_block_early(monkeypatch: pytest.MonkeyPatch) -> None:
    visible = PrefixCache.first_visible_block
    monkeypatch.setattr(PrefixCache, "first_visible_block", lambda self, window, position: visible(self, window, position + 1))


def _window_groups_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixCache, "_longest_agreed", lambda self, windowed, limit: limit)


def _hit_covers_whole_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    match = PrefixCache.match
    monkeypatch.setattr(PrefixCache, "match", lambda self, digests, num_tokens: match(self, digests, num_tokens + 1 if num_tokens else 0))


def _block_is_published_before_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    publish = KVManager.publish

    def early(self: KVManager, blocks: object, token_ids: list[int], num_computed: int) -> None:
        tables = blocks.groups  # type: ignore[attr-defined]
        reach = min(len(token_ids), len(tables[0]) * self.block_size)
        publish(self, blocks, token_ids, reach)  # type: ignore[arg-type]

    monkeypatch.setattr(KVManager, "publish", early)


def _hash_forgets_what_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = prefix_cache._digest
    monkeypatch.setattr(prefix_cache, "_digest", lambda hasher, content: digest(hasher, content[16:] or content))


def _shared_block_is_freed_by_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    release = BlockPool.release

    def release_for_all(self: BlockPool, blocks: object) -> None:
        blocks = list(blocks)  # type: ignore[call-overload]
        for block in blocks:
            self._ref_counts[block] = min(self._ref_counts[block], 1)
        release(self, blocks)

    monkeypatch.setattr(BlockPool, "release", release_for_all)


def _evicted_block_keeps_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockPool, "_forget", lambda self, block: None)


def _preempted_sequence_trusts_its_old_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    preempt = Scheduler._preempt

    def keep(self: Scheduler, sequence: object) -> None:
        computed = sequence.num_computed  # type: ignore[attr-defined]
        preempt(self, sequence)  # type: ignore[arg-type]
        sequence.num_computed = computed  # type: ignore[attr-defined]

    monkeypatch.setattr(Scheduler, "_preempt", keep)


def _aborted_sequence_gets_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    remove = Scheduler._remove

    def stay_running(self: Scheduler, sequence: object) -> None:
        remove(self, sequence)  # type: ignore[arg-type]
        sequence.state = "running"  # type: ignore[attr-defined]

    monkeypatch.setattr(Scheduler, "_remove", stay_running)


def _wrong_guesses_count_as_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = scheduler.checked_event

    def all_computed(sequence: Sequence, *rest: Any) -> TokenEvent:
        event = checked(sequence, *rest)
        if len(event.token_ids) > 1:
            sequence.token_ids.append(event.token_ids[-1])
            sequence.num_computed += 1
        return event

    monkeypatch.setattr(scheduler, "checked_event", all_computed)


def _guesses_are_taken_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    def believed(self: FakeRunner, share: object, client: object) -> SampledToken:
        guesses = share.token_ids[len(share.token_ids) - share.num_drafts :]  # type: ignore[attr-defined]
        return SampledToken(token_id=guesses[0], more=tuple(SampledToken(token_id=token) for token in guesses[1:]))

    monkeypatch.setattr(FakeRunner, "verified", believed)


@pytest.mark.parametrize(
    "plant",
    [
        _tenants_share,
        _window_gives_back_one_block_early,
        _window_groups_are_not_asked,
        _hit_covers_whole_prompt,
        _block_is_published_before_it_is_full,
        _hash_forgets_what_came_before,
        _shared_block_is_freed_by_the_first,
        _evicted_block_keeps_its_key,
        _preempted_sequence_trusts_its_old_blocks,
        _aborted_sequence_gets_its_token,
        _wrong_guesses_count_as_computed,
        _guesses_are_taken_unseen,
    ],
)
def test_planted_fault_is_seen(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(SimulationError, match="repeat with"):
        simulate(5_000, seed=0)
