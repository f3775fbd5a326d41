"""Block tables: growth, windows, sharing, and how much one sequence can need."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.artifacts.manifest import KVFacts, KVGroup
from llmc.errors import ConfigError, InternalError
from llmc.runtime.kv import KVManager, max_tokens_that_fit, peak_blocks


def facts_of(*windows: int, block_size: int = 4) -> KVFacts:
    groups = [KVGroup(layers=[index], window=window) for index, window in enumerate(windows)]
    return KVFacts(block_size=block_size, dtype="float32", num_kv_heads=[1] * len(groups), head_dim=[8] * len(groups), groups=groups)


def manager_of(*windows: int, num_blocks: int = 32, chunk: int = 8, caching: bool = True) -> KVManager:
    return KVManager(facts_of(*windows), num_blocks=num_blocks, max_chunk_tokens=chunk, enable_prefix_caching=caching, secret=b"test")


def test_table_grows_at_its_end_and_is_freed() -> None:
    kv = manager_of(0)
    blocks = kv.new_sequence([1] * 10, "")
    kv.extend(blocks, 4)
    front = list(blocks.groups[0])
    kv.extend(blocks, 10)
    assert blocks.groups[0][:1] == front
    assert (len(blocks.groups[0]), blocks.ready_tokens) == (3, 12)
    kv.check([blocks])
    kv.free(blocks)
    kv.check([blocks])
    assert kv.pool.num_free == 32


def test_groups_never_share_a_block() -> None:
    kv = manager_of(0, 6, 0)
    blocks = kv.new_sequence([1] * 10, "")
    kv.extend(blocks, 10)
    assert len({block for group in blocks.groups for block in group}) == 9


def test_window_gives_back_what_nobody_sees_any_more() -> None:
    kv = manager_of(0, 6)
    blocks = kv.new_sequence([1] * 30, "")
    kv.extend(blocks, 13)
    kv.return_passed(blocks, 12)  # sees [7, 12]: block 0 is passed, block 1 holds token 7
    assert blocks.groups[1][0] == -1
    assert blocks.groups[1][1] >= 0
    kv.return_passed(blocks, 13)  # sees [8, 13]
    assert blocks.groups[1][:2] == [-1, -1]
    assert all(block >= 0 for block in blocks.groups[0])
    kv.check([blocks])


def test_freed_lists_stay_readable_for_the_step_in_flight() -> None:
    kv = manager_of(0)
    blocks = kv.new_sequence([1] * 8, "")
    kv.extend(blocks, 8)
    seen_by_step = blocks.groups
    before = [list(group) for group in seen_by_step]
    kv.free(blocks)
    assert [list(group) for group in seen_by_step] == before


def test_computed_blocks_are_found_by_the_same_tenant_alone() -> None:
    kv = manager_of(0, 6)
    tokens = list(range(13))
    first = kv.new_sequence(tokens, "a")
    kv.extend(first, 13)
    assert kv.match(kv.new_sequence(tokens, "a"), 13).num_blocks == 0  # nothing is computed yet
    kv.publish(first, tokens, 13)
    second = kv.new_sequence(tokens, "a")
    hit = kv.match(second, 13)
    assert hit.num_blocks == 3
    assert kv.match(kv.new_sequence(tokens, "b"), 13).num_blocks == 0
    kv.attach(second, hit)
    kv.extend(second, 13)
    assert second.groups[0][:3] == first.groups[0][:3]
    assert second.groups[0][3] != first.groups[0][3]
    kv.check([first, second])


def test_without_prefix_caching_nothing_is_kept() -> None:
    kv = manager_of(0, caching=False)
    blocks = kv.new_sequence([1] * 8, "")
    kv.extend(blocks, 8)
    kv.publish(blocks, [1] * 8, 8)
    kv.free(blocks)
    assert (kv.pool.num_cached, kv.pool.num_free) == (0, 32)


def test_a_prefix_is_evicted_after_what_follows_it() -> None:
    kv = manager_of(0, num_blocks=4)
    tokens = list(range(16))
    blocks = kv.new_sequence(tokens, "")
    kv.extend(blocks, 16)
    kv.publish(blocks, tokens, 16)
    kv.free(blocks)
    kv.pool.allocate(2)
    assert kv.match(kv.new_sequence(tokens, ""), 16).num_blocks == 2


def test_drop_cache_forgets() -> None:
    kv = manager_of(0)
    tokens = list(range(9))
    blocks = kv.new_sequence(tokens, "")
    kv.extend(blocks, 9)
    kv.publish(blocks, tokens, 9)
    kv.free(blocks)
    assert kv.drop_cache() == 2
    assert kv.match(kv.new_sequence(tokens, ""), 9).num_blocks == 0


def test_extending_past_the_pool_is_our_own_bug() -> None:
    kv = manager_of(0, num_blocks=2)
    blocks = kv.new_sequence([1] * 12, "")
    assert kv.blocks_to_extend(blocks, 12) == 3
    with pytest.raises(InternalError, match="blocks wanted"):
        kv.extend(blocks, 12)


def test_negative_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="window of 0 or more"):
        manager_of(-1)


@given(
    windows=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    num_tokens=st.integers(1, 60),
    max_chunk=st.integers(1, 9),
    data=st.data(),
)
def test_peak_is_never_passed(windows: list[int], num_tokens: int, max_chunk: int, data: st.DataObject) -> None:
    facts = facts_of(*windows)
    peak = peak_blocks(facts, num_tokens, max_chunk_tokens=max_chunk)
    kv = KVManager(facts, num_blocks=peak, max_chunk_tokens=max_chunk, enable_prefix_caching=True)
    blocks = kv.new_sequence([1] * num_tokens, "")
    computed = 0
    while computed < num_tokens:
        end = min(num_tokens, computed + data.draw(st.integers(1, max_chunk)))
        if end > blocks.ready_tokens:
            kv.return_passed(blocks, computed)
            kv.extend(blocks, end)  # raises when the pool is too small
        computed = end
    kv.check([blocks])


@given(windows=st.lists(st.integers(0, 12), min_size=1, max_size=3), num_blocks=st.integers(1, 40), chunk=st.integers(1, 20))
def test_most_tokens_that_fit_is_exact(windows: list[int], num_blocks: int, chunk: int) -> None:
    facts = facts_of(*windows)
    fit = max_tokens_that_fit(facts, num_blocks=num_blocks, max_chunk_tokens=chunk, limit=100)
    assert peak_blocks(facts, fit, max_chunk_tokens=chunk) <= num_blocks
    assert fit == 100 or peak_blocks(facts, fit + 1, max_chunk_tokens=chunk) > num_blocks
