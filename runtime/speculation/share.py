"""How much KV cache a draft model gets: as many tokens as the model it runs ahead of, so that one share of memory serves both."""

from __future__ import annotations

from llmc.artifacts.kv_bytes import block_bytes
from llmc.artifacts.manifest import KVFacts


def draft_blocks(num_blocks: int, kv: KVFacts, draft: KVFacts) -> int:
    """Blocks of the draft's pool that hold the tokens which `num_blocks` blocks of the other model hold; at least two. Asks."""
    tokens_times_groups = num_blocks * kv.block_size * len(draft.groups)
    return max(2, -(-tokens_times_groups // (len(kv.groups) * draft.block_size)))


def bytes_beside_block(kv: KVFacts, draft: KVFacts) -> int:
    """Bytes of the draft's KV cache for each block of the other model's, rounded up. Asks."""
    return -(-block_bytes(draft) * kv.block_size * len(draft.groups) // (len(kv.groups) * draft.block_size))
