"""The block pool against a model of it: any sequence of allocations, shares, releases, publications and resets."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmc.errors import InternalError
from llmc.runtime.kv import BlockPool

NUM_BLOCKS = 7


class PoolMachine(RuleBasedStateMachine):
    """Holders are lists of blocks; the model knows each key's block and the order in which nobody held them any more."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.holders: list[list[int]] = []
        self.keys: dict[str, int] = {}
        self.unheld_order: list[int] = []  # cached blocks, oldest first

    @rule(count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, count: int) -> None:
        held = {block for blocks in self.holders for block in blocks}
        if count > NUM_BLOCKS - len(held):
            with pytest.raises(InternalError, match="blocks wanted"):
                self.pool.allocate(count)
            return
        num_evicted = max(0, count - self.pool.num_free)
        evicted, self.unheld_order = self.unheld_order[:num_evicted], self.unheld_order[num_evicted:]
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not held & set(blocks)
        assert set(evicted) <= set(blocks)  # the oldest cached ones, and only when free ones ran out
        self.keys = {key: block for key, block in self.keys.items() if block not in evicted}
        self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.release(blocks)
        still_held = {block for others in self.holders for block in others}
        self.unheld_order += [block for block in blocks if block in self.keys.values() and block not in still_held]

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data(), key=st.sampled_from("abcd"))
    def publish(self, data: st.DataObject, key: str) -> None:
        block = data.draw(st.sampled_from([block for blocks in self.holders for block in blocks]))
        expected = key not in self.keys and block not in self.keys.values()
        assert self.pool.publish(block, key) is expected
        if expected:
            self.keys[key] = block

    @rule(key=st.sampled_from("abcd"))
    def share(self, key: str) -> None:
        block = self.pool.lookup(key)
        assert block == self.keys.get(key)
        if block is not None:
            self.pool.hold([block])
            self.holders.append([block])
            self.unheld_order = [other for other in self.unheld_order if other != block]

    @rule()
    def drop_cache(self) -> None:
        assert self.pool.drop_cache() == len(self.unheld_order)
        self.keys.clear()
        self.unheld_order.clear()

    @invariant()
    def books_balance(self) -> None:
        counts: dict[int, int] = {}
        for blocks in self.holders:
            for block in blocks:
                counts[block] = counts.get(block, 0) + 1
        self.pool.check(counts)
        assert self.pool.num_held == len(counts)
        assert self.pool.num_cached == len(self.unheld_order)
        assert self.pool.num_available == NUM_BLOCKS - len(counts)


TestBlockPool = PoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_asking_changes_nothing() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.publish(block, "key")
    pool.release([block])
    for _ in range(3):
        assert pool.lookup("key") == block
        assert pool.num_available == 2
    assert pool.ref_count(block) == 0
    assert (pool.num_free, pool.num_cached) == (1, 1)


def test_released_twice_is_our_own_bug() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(InternalError, match="does not hold it"):
        pool.release(blocks)


def test_free_block_cannot_be_shared_or_published() -> None:
    pool = BlockPool(1)
    with pytest.raises(InternalError, match="is free"):
        pool.hold([0])
    with pytest.raises(InternalError, match="nobody holds it"):
        pool.publish(0, "key")


def test_check_sees_a_wrong_count() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.check({block: 1})
    with pytest.raises(InternalError, match="differ from the block tables"):
        pool.check({block: 2})


def test_check_sees_a_block_in_two_states() -> None:
    pool = BlockPool(2)
    pool._free.append(pool.allocate(1)[0])
    with pytest.raises(InternalError, match="in two states"):
        pool.check()
