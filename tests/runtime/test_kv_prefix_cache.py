"""Names of blocks, and hits agreed over KV groups."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.runtime.kv import BlockPool, PrefixCache

SIZE = 4


def cache_with(windows: tuple[int, ...], present: list[set[int]], num_blocks: int = 8) -> tuple[PrefixCache, list[bytes], list[int]]:
    """A cache in which group g has the logical blocks `present[g]` of one sequence of num_blocks blocks."""
    pool = BlockPool(64)
    cache = PrefixCache(pool, windows, SIZE, secret=b"test")
    tokens = list(range(num_blocks * SIZE + 1))
    digests: list[bytes] = []
    cache.extend_digests(digests, cache.root(""), tokens, len(tokens))
    groups = tuple([pool.allocate(1)[0] if index in have else -1 for index in range(num_blocks)] for have in present)
    cache.publish(digests, groups, 0, num_blocks)
    return cache, digests, tokens


def digests_of(tokens: list[int], *, salt: str = "", secret: bytes = b"test") -> list[bytes]:
    cache = PrefixCache(BlockPool(1), (0,), SIZE, secret=secret)
    digests: list[bytes] = []
    cache.extend_digests(digests, cache.root(salt), tokens, len(tokens))
    return digests


def test_digest_names_a_block_and_all_before_it() -> None:
    first, second = digests_of([1, 2, 3, 4, 5, 6, 7, 8]), digests_of([9, 2, 3, 4, 5, 6, 7, 8])
    assert len(first) == 2
    assert first[1] != second[1]  # same tokens in the block, others before
    assert digests_of([1, 2, 3, 4, 5])[0] == first[0]  # only full blocks


def test_digests_differ_by_tenant_and_by_process() -> None:
    tokens = [1, 2, 3, 4]
    assert digests_of(tokens) == digests_of(tokens)
    assert digests_of(tokens) != digests_of(tokens, salt="tenant")
    assert digests_of(tokens) != digests_of(tokens, secret=b"another")
    one, other = (PrefixCache(BlockPool(1), (0,), SIZE) for _ in range(2))
    assert one.root("") != other.root("")


def test_lone_surrogates_in_a_salt_are_only_bytes() -> None:
    assert digests_of([1, 2, 3, 4], salt="\ud800") != digests_of([1, 2, 3, 4], salt="\ud801")


@given(st.lists(st.integers(0, 2**31 - 1), max_size=40), st.integers(0, 40))
def test_digests_grow_to_the_same_names(tokens: list[int], cut: int) -> None:
    cache = PrefixCache(BlockPool(1), (0,), SIZE, secret=b"test")
    digests: list[bytes] = []
    for length in (min(cut, len(tokens)), len(tokens)):
        cache.extend_digests(digests, cache.root(""), tokens, length)
    assert digests == digests_of(tokens)


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_at_least_one_token_is_left_to_compute(num_tokens: int, blocks: int) -> None:
    cache, digests, _ = cache_with((0,), [set(range(8))])
    assert cache.match(digests, num_tokens).num_blocks == blocks


def test_hit_ends_at_the_first_gap_without_window() -> None:
    cache, digests, tokens = cache_with((0,), [{0, 1, 3, 4}])
    hit = cache.match(digests, len(tokens))
    assert hit.num_blocks == 2
    assert len(hit.block_ids[0]) == 2


def test_window_needs_only_what_it_still_sees() -> None:
    # At position 16 a window of 5 sees [12, 16], so blocks 3 and on; blocks 0 to 2 are not needed.
    cache, digests, tokens = cache_with((5,), [{3}])
    hit = cache.match(digests, len(tokens))
    assert hit.num_blocks == 4
    assert hit.block_ids[0][:3] == [-1, -1, -1]
    assert hit.block_ids[0][3] >= 0


def test_window_of_one_sees_itself_alone() -> None:
    cache, digests, tokens = cache_with((1,), [set()])
    hit = cache.match(digests, len(tokens))
    assert (hit.num_blocks, hit.block_ids) == (8, ([-1] * 8,))


@given(st.lists(st.sets(st.integers(0, 7)), min_size=3, max_size=3))
def test_hit_is_the_longest_that_all_groups_have(present: list[set[int]]) -> None:
    windows = (0, 6, 11)
    cache, digests, tokens = cache_with(windows, present)

    def agreed(count: int) -> bool:
        for window, have in zip(windows, present, strict=True):
            first = max(0, count * SIZE - window + 1) // SIZE if window else 0
            if not set(range(first, count)) <= have:
                return False
        return True

    hit = cache.match(digests, len(tokens))
    assert hit.num_blocks == max(count for count in range(9) if agreed(count))
    for group in hit.block_ids:
        assert len(group) == hit.num_blocks
