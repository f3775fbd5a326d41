"""One pool of physical KV blocks: who holds which, which are free, which are only remembered.

A block is in exactly one state:
    free     nobody holds it and its content means nothing
    cached   nobody holds it, but its content has a key and can be found again; evicted oldest first
    held     `ref_count` sequences hold it; it may have a key too, so that others can join
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping

from llmc.errors import InternalError


class BlockPool:
    """Reference counts, free list and cached blocks of `num_blocks` blocks. Plain Python; knows nothing of tokens.

    The key map holds at most one key per block, so it is bounded by the pool. Keys are opaque; who makes them decides
    what equal content means.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._keys: list[Hashable | None] = [None] * num_blocks
        self._block_of_key: dict[Hashable, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is the one still in the CPU's caches
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    # Asking changes nothing.

    @property
    def num_free(self) -> int:
        """Blocks whose content means nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks nobody holds whose content can be found again."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free ones, then cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        """Blocks that at least one sequence holds."""
        return self.num_blocks - len(self._free) - len(self._cached)

    def lookup(self, key: Hashable) -> int | None:
        """The block with this key, or None. Does not count as a use."""
        return self._block_of_key.get(key)

    def ref_count(self, block: int) -> int:
        """Sequences holding the block."""
        return self._ref_counts[block]

    # Doing changes the pool.

    def allocate(self, count: int) -> list[int]:
        """Give `count` blocks to one sequence, evicting the cached blocks unused for longest when free ones run out.

        Raises:
            InternalError: fewer than `count` are available; ask `num_available` first.
        """
        if count > len(self._free) + len(self._cached):
            raise InternalError(f"block pool: {count} blocks wanted, {self.num_available} of {self.num_blocks} available; ask first")
        for _ in range(count - len(self._free)):
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
            self._free.append(block)
        first = len(self._free) - count
        blocks = self._free[first:]
        del self._free[first:]
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """Let one more sequence hold each block. A cached block stops being evictable.

        Raises:
            InternalError: a block is free, so its content means nothing.
        """
        for block in blocks:
            if self._ref_counts[block] == 0:
                if block not in self._cached:
                    raise InternalError(f"block pool: block {block} is free and cannot be shared")
                del self._cached[block]
            self._ref_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Let one sequence give up each block, in the order in which they may be evicted.

        Raises:
            InternalError: nobody holds a block.
        """
        for block in blocks:
            count = self._ref_counts[block]
            if count <= 0:
                raise InternalError(f"block pool: block {block} was released by a sequence that does not hold it")
            self._ref_counts[block] = count - 1
            if count == 1:
                if self._keys[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def publish(self, block: int, key: Hashable) -> bool:
        """Make a held block findable by `key`. Returns False, changing nothing, when the key or the block is taken already.

        Two sequences may compute the same content at the same time; the first to publish wins and the other block stays private,
        because a block table only ever grows at its end.
        """
        if self._ref_counts[block] == 0:
            raise InternalError(f"block pool: block {block} was published while nobody holds it")
        if key in self._block_of_key or self._keys[block] is not None:
            return False
        self._keys[block] = key
        self._block_of_key[key] = block
        return True

    def drop_cache(self) -> int:
        """Forget every key; cached blocks become free. Returns how many did."""
        dropped = len(self._cached)
        self._free.extend(self._cached)
        self._cached.clear()
        self._block_of_key.clear()
        self._keys = [None] * self.num_blocks
        return dropped

    def check(self, ref_counts: Mapping[int, int] | None = None) -> None:
        """Recount everything; `ref_counts` (block -> holders, held blocks only) is compared when given. Changes nothing.

        Raises:
            InternalError: the books do not balance.
        """
        free, cached = set(self._free), set(self._cached)
        held = {block: count for block, count in enumerate(self._ref_counts) if count}
        problems = []
        if len(free) != len(self._free):
            problems.append("a block is in the free list twice")
        if free & cached or free & held.keys() or cached & held.keys():
            problems.append("a block is in two states")
        if len(free) + len(cached) + len(held) != self.num_blocks:
            problems.append(f"free {len(free)} + cached {len(cached)} + held {len(held)} is not {self.num_blocks}")
        if any(count < 0 for count in held.values()):
            problems.append("a reference count is negative")
        keyed = {key: block for block, key in enumerate(self._keys) if key is not None}
        if keyed != self._block_of_key or len(keyed) != self.num_blocks - self._keys.count(None):
            problems.append("keys of blocks and blocks of keys disagree")
        if any(self._keys[block] is None for block in cached) or any(self._keys[block] is not None for block in free):
            problems.append("a cached block has no key or a free one has one")
        if ref_counts is not None and held != dict(ref_counts):
            problems.append(f"reference counts {held} differ from the block tables' {dict(ref_counts)}")
        if problems:
            raise InternalError(f"block pool: {'; '.join(problems)}")

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        self._keys[block] = None
        if key is not None:
            del self._block_of_key[key]
