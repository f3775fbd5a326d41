"""Block tables of sequences: one list of physical blocks per KV group, grown as tokens are computed.

Layers with the same sliding window share a group and a table; all groups draw from one pool. A table only grows at its end,
and its front becomes -1 where a window has moved on and the block was given back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from llmc.artifacts.manifest import KVFacts
from llmc.errors import ConfigError
from llmc.runtime.kv.block_pool import BlockPool
from llmc.runtime.kv.prefix_cache import PrefixCache, PrefixHit

_NEVER = 1 << 62  # tokens


@dataclass(slots=True, eq=False)
class SequenceBlocks:
    """One sequence's blocks. Changed by `KVManager` alone."""

    groups: tuple[list[int], ...]  # per KV group: physical block of each logical block, -1 where given back
    num_returned: list[int]  # per KV group: leading entries that are -1
    root: bytes  # digest before the first block
    digests: list[bytes]  # of the full blocks known so far; empty without prefix caching
    publish_at: int  # tokens computed from which `publish` has another full block to offer
    ready_tokens: int = 0  # tokens that can be computed without asking the manager again


def max_tokens_that_fit(facts: KVFacts, *, num_blocks: int, max_chunk_tokens: int, limit: int) -> int:
    """The most tokens, up to `limit`, whose K and V one sequence alone can keep in a pool of `num_blocks`. Asks."""
    return bisect_right(range(limit + 1), num_blocks, key=lambda tokens: peak_blocks(facts, tokens, max_chunk_tokens=max_chunk_tokens)) - 1


def peak_blocks(facts: KVFacts, num_tokens: int, *, max_chunk_tokens: int) -> int:
    """Blocks one sequence holds at most while its first `num_tokens` tokens are computed, over all groups. Asks."""
    whole = -(-num_tokens // facts.block_size)
    return _sum_over_groups(whole, [group.window for group in facts.groups], facts.block_size, max_chunk_tokens)


def _sum_over_groups(num_blocks: int, windows: Iterable[int], block_size: int, max_chunk_tokens: int) -> int:
    """Blocks held for `num_blocks` logical ones: all of them without a window, at most what a window and a chunk touch with one."""
    total = 0
    for window in windows:
        # window - 1 + chunk neighbouring tokens, wherever they start.
        seen = -(-(window + max_chunk_tokens - 2) // block_size) + 1
        total += min(num_blocks, seen) if window else num_blocks
    return total


class KVManager:
    """Allocates, shares and gives back the blocks of sequences.

    Args:
        facts: the artifact's KV layout; gives block size and windows.
        num_blocks: physical blocks in the pool, shared by all groups.
        max_chunk_tokens: most tokens of one sequence computed in one step.
        enable_prefix_caching: find and share full blocks by content.
        secret: key of the content hashes; None makes a random one.
    """

    def __init__(
        self, facts: KVFacts, *, num_blocks: int, max_chunk_tokens: int, enable_prefix_caching: bool, secret: bytes | None = None
    ) -> None:
        if not facts.groups or any(group.window < 0 for group in facts.groups):
            raise ConfigError(f"the manifest's KV groups must be at least one, each with a window of 0 or more; found {facts.groups}")
        self.facts = facts
        self.block_size = facts.block_size
        self.pool = BlockPool(num_blocks)
        self._max_chunk_tokens = max_chunk_tokens
        self._windows = tuple(group.window for group in facts.groups)
        self._has_window = any(self._windows)
        self._cache = PrefixCache(self.pool, self._windows, facts.block_size, secret=secret)
        self._caching = enable_prefix_caching

    # Asking changes nothing.

    def match(self, blocks: SequenceBlocks, num_tokens: int) -> PrefixHit:
        """The cached prefix of a sequence of `num_tokens` known tokens; it never covers all of them."""
        return self._cache.match(blocks.digests, num_tokens)

    def blocks_to_admit(self, hit: PrefixHit, num_tokens: int) -> int:
        """Blocks that must be available to compute all `num_tokens` tokens after `hit`, those that the hit itself takes included."""
        taken = sum(1 for group in hit.block_ids for block in group if block >= 0 and self.pool.ref_count(block) == 0)
        return taken + self._blocks_between(hit.num_blocks, num_tokens)

    def blocks_to_finish(self, blocks: SequenceBlocks, num_tokens: int) -> int:
        """Blocks that a sequence still has to allocate until all `num_tokens` tokens are computed; an upper bound with windows."""
        return self._blocks_between(len(blocks.groups[0]), num_tokens)

    def blocks_to_extend(self, blocks: SequenceBlocks, end: int) -> int:
        """Blocks that `extend` would allocate for tokens up to `end`."""
        return max(0, -(-end // self.block_size) - len(blocks.groups[0])) * len(self._windows)

    # Doing.

    def new_sequence(self, token_ids: list[int], salt: str, adapter: int = 0) -> SequenceBlocks:
        """An empty table for a sequence of an adapter (0: of the model itself), with the digests of its full blocks. Takes nothing from
        the pool."""
        blocks = SequenceBlocks(
            groups=tuple([] for _ in self._windows),
            num_returned=[0] * len(self._windows),
            root=self._cache.root(salt, adapter),
            digests=[],
            publish_at=self._publish_after(0),
        )
        if self._caching:
            self._cache.extend_digests(blocks.digests, blocks.root, token_ids, len(token_ids))
        return blocks

    def attach(self, blocks: SequenceBlocks, hit: PrefixHit) -> None:
        """Start an empty table with a hit's blocks, which the sequence now holds too. Changes the pool."""
        for group in hit.block_ids:
            self.pool.hold(block for block in group if block >= 0)
        blocks.groups = tuple(list(group) for group in hit.block_ids)
        blocks.num_returned = [group.count(-1) for group in blocks.groups]
        blocks.publish_at = self._publish_after(hit.num_blocks)
        blocks.ready_tokens = 0

    def return_passed(self, blocks: SequenceBlocks, start: int) -> None:
        """Give back blocks that no query at `start` or later sees. Changes the pool.

        Called when new blocks are needed, not in every step: until then the sequence holds no more than it did.
        """
        if not self._has_window:
            return
        for group, window in enumerate(self._windows):
            if not window:
                continue
            table, first = blocks.groups[group], blocks.num_returned[group]
            keep = min(self._cache.first_visible_block(window, start), len(table))
            if keep > first:
                self.pool.release(table[first:keep])
                table[first:keep] = [-1] * (keep - first)
                blocks.num_returned[group] = keep

    def extend(self, blocks: SequenceBlocks, end: int) -> None:
        """Allocate what tokens up to `end` need. Changes the pool; call `return_passed` first.

        Raises:
            InternalError: not enough blocks are available; ask `blocks_to_extend` first.
        """
        missing = -(-end // self.block_size) - len(blocks.groups[0])
        if missing > 0:
            new = self.pool.allocate(missing * len(self._windows))
            for group, table in enumerate(blocks.groups):
                table.extend(new[group * missing : (group + 1) * missing])
        blocks.ready_tokens = len(blocks.groups[0]) * self.block_size

    def publish(self, blocks: SequenceBlocks, token_ids: list[int], num_computed: int) -> None:
        """Offer the full blocks among tokens [0, num_computed), now computed, to the prefix cache. Changes the pool's keys."""
        if num_computed < blocks.publish_at:
            return
        full = num_computed // self.block_size
        self._cache.extend_digests(blocks.digests, blocks.root, token_ids, num_computed)
        self._cache.publish(blocks.digests, blocks.groups, blocks.publish_at // self.block_size - 1, full)
        blocks.publish_at = self._publish_after(full)

    def free(self, blocks: SequenceBlocks) -> None:
        """Give back every block. Changes the pool. The old lists stay as they are: a step in flight may still read them."""
        for table in blocks.groups:
            # From the end: a prefix is of use to more sequences than what follows it, so it is evicted last.
            self.pool.release([block for block in reversed(table) if block >= 0])
        blocks.groups = tuple([] for _ in self._windows)
        blocks.num_returned = [0] * len(self._windows)
        blocks.publish_at = self._publish_after(0)
        blocks.ready_tokens = 0

    def drop_cache(self) -> int:
        """Forget all cached content, so that nothing computed before is found again. Returns the number of blocks freed."""
        return self.pool.drop_cache()

    def check(self, all_blocks: Iterable[SequenceBlocks]) -> None:
        """Recount the pool against the tables of all sequences. Changes nothing.

        Raises:
            InternalError: they disagree.
        """
        holders: Counter[int] = Counter()
        for blocks in all_blocks:
            for table in blocks.groups:
                holders.update(table)
        del holders[-1]
        self.pool.check(holders)

    def _publish_after(self, num_blocks: int) -> int:
        """`publish_at` of a sequence whose first `num_blocks` blocks were offered."""
        return (num_blocks + 1) * self.block_size if self._caching else _NEVER

    def _blocks_between(self, num_blocks: int, num_tokens: int) -> int:
        missing = max(0, -(-num_tokens // self.block_size) - num_blocks)
        return _sum_over_groups(missing, self._windows, self.block_size, self._max_chunk_tokens)
