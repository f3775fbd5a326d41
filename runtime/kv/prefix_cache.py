"""Find KV blocks again by what they hold: a keyed hash of a block's tokens and of everything before them.

Hashes are keyed with a secret of this process and start from the tenant's salt and the LoRA adapter's number, so nobody outside can
compute or guess a block's key, and two tenants, or two adapters, never meet in one block.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from llmc.runtime.kv.block_pool import BlockPool

_DIGEST_BYTES = 16  # 128 bits under a secret key: collisions cannot be searched for, and chance needs 2^64 blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixHit:
    """Tokens [0, num_blocks * block_size) need not be computed.

    `block_ids` has one list per KV group, `num_blocks` long, -1 where the group's window no longer sees the block.
    """

    num_blocks: int
    block_ids: tuple[list[int], ...]


class PrefixCache:
    """Names blocks by content and looks names up in the pool, agreed over all KV groups.

    Args:
        pool: owner of the blocks and of the key map.
        windows: per KV group, tokens a query sees, itself included; 0 = all.
        block_size: tokens per block.
        secret: key of the hashes, at most 64 bytes; None makes a random one.
    """

    def __init__(self, pool: BlockPool, windows: Sequence[int], block_size: int, *, secret: bytes | None = None) -> None:
        self._pool = pool
        self._windows = tuple(windows)
        self._block_size = block_size
        self._pack_block = struct.Struct(f"{block_size}i").pack
        secret = secrets.token_bytes(32) if secret is None else secret
        # Copied for each digest: half the time of keying a new one.
        self._salt_hasher = hashlib.blake2b(key=secret, digest_size=_DIGEST_BYTES, person=b"llmc-salt")
        self._block_hasher = hashlib.blake2b(key=secret, digest_size=_DIGEST_BYTES, person=b"llmc-block")

    def root(self, salt: str, adapter: int = 0) -> bytes:
        """The digest that stands before the first block of a tenant and a LoRA adapter, 0 for none. Asks."""
        return _digest(self._salt_hasher, adapter.to_bytes(8, "little") + salt.encode("utf-8", "surrogatepass"))

    def extend_digests(self, digests: list[bytes], root: bytes, token_ids: list[int], num_tokens: int) -> None:
        """Append the digests of the full blocks of `token_ids[:num_tokens]` that `digests` does not have yet.

        Digest i covers tokens [0, (i + 1) * block_size) through its parent. Changes `digests` only.
        """
        size, pack = self._block_size, self._pack_block
        parent = digests[-1] if digests else root
        for index in range(len(digests), num_tokens // size):
            parent = _digest(self._block_hasher, parent + pack(*token_ids[index * size : (index + 1) * size]))
            digests.append(parent)

    def match(self, digests: list[bytes], num_tokens: int) -> PrefixHit:
        """The longest prefix of `num_tokens` tokens that every KV group still has. Asks; nothing is held or counted as used.

        A group without window must have blocks [0, n). A group with a window must have those that a query at position
        n * block_size sees. At least one token is always left to compute, since only computing gives logits.
        """
        limit = min(len(digests), max(0, num_tokens - 1) // self._block_size)
        lookup = self._pool.lookup
        full: dict[int, list[int]] = {}
        for group, window in enumerate(self._windows):
            if window:
                continue
            found: list[int] = []
            for digest in digests[:limit]:
                block = lookup((group, digest))
                if block is None:
                    break
                found.append(block)
            full[group] = found
            limit = len(found)
        if limit == 0:
            return PrefixHit(num_blocks=0, block_ids=tuple([] for _ in self._windows))

        windowed = {group: [lookup((group, digest)) for digest in digests[:limit]] for group, window in enumerate(self._windows) if window}
        count = self._longest_agreed(windowed, limit)
        block_ids = []
        for group, window in enumerate(self._windows):
            if not window:
                block_ids.append(full[group][:count])
                continue
            first = self.first_visible_block(window, count * self._block_size)
            seen = [block for block in windowed[group][first:count] if block is not None]
            block_ids.append([-1] * first + seen)
        return PrefixHit(num_blocks=count, block_ids=tuple(block_ids))

    def publish(self, digests: list[bytes], groups: tuple[list[int], ...], first: int, last: int) -> None:
        """Make logical blocks [first, last) of every group findable. Changes the pool's keys.

        Their K and V must have been computed. Blocks a window has given back (-1) are passed over.
        """
        publish = self._pool.publish
        for group, blocks in enumerate(groups):
            for index in range(first, last):
                if blocks[index] >= 0:
                    publish(blocks[index], (group, digests[index]))

    def first_visible_block(self, window: int, position: int) -> int:
        """Logical index of the first block that a query at `position` sees through `window` (> 0). Asks."""
        return max(0, position - window + 1) // self._block_size

    def _longest_agreed(self, windowed: dict[int, list[int | None]], limit: int) -> int:
        """Largest n <= limit such that every windowed group has all blocks that position n * block_size sees."""
        runs = dict.fromkeys(windowed, 0)  # blocks present without a gap, ending just before n
        best = 0
        for count in range(1, limit + 1):
            agreed = True
            for group, found in windowed.items():
                runs[group] = runs[group] + 1 if found[count - 1] is not None else 0
                needed = count - min(count, self.first_visible_block(self._windows[group], count * self._block_size))
                agreed = agreed and runs[group] >= needed
            if agreed:
                best = count
        return best


def _digest(hasher: hashlib.blake2b, content: bytes) -> bytes:
    own = hasher.copy()
    own.update(content)
    return own.digest()
