"""What K and V take, from the manifest's facts: the one place where the compiler's estimates, `llmc inspect` and the KV pool agree.

No numpy here: the front process reads manifests too.
"""

from __future__ import annotations

from llmc.artifacts.element_sizes import nbytes_of
from llmc.artifacts.manifest import KVFacts

SCALE_BYTES = 4  # of an int8 cache: a float32 per token and head, in the tile with its integers


def cache_shape(kv: KVFacts, layer: int, num_blocks: int) -> tuple[int, int, int, int]:
    """Shape of K, and of V, of one layer: [num_blocks, num_kv_heads, block_size, head_dim], an int8 one wider by its scales."""
    width = kv.head_dim[layer] + (SCALE_BYTES if kv.dtype == "int8" else 0)
    return num_blocks, kv.num_kv_heads[layer], kv.block_size, width


def layer_block_bytes(kv: KVFacts, layer: int) -> int:
    """Bytes of K, or of V, of one block in one layer."""
    return nbytes_of(kv.dtype, cache_shape(kv, layer, 1))


def block_bytes(kv: KVFacts) -> int:
    """Bytes one block takes, K and V of every layer together."""
    return sum(2 * layer_block_bytes(kv, layer) for layer in range(len(kv.num_kv_heads)))


def token_bytes(kv: KVFacts) -> int:
    """Bytes of K and V of one token over all layers; window layers count in full, although they give old blocks back."""
    return block_bytes(kv) // kv.block_size
