"""What K and V take, from the manifest's facts: the one place where the compiler's estimates, `llmc inspect` and the KV pool agree.

No numpy here: the front process reads manifests too.
"""

from __future__ import annotations

from llmc.artifacts.element_sizes import nbytes_of
from llmc.artifacts.manifest import KVFacts


def layer_block_bytes(kv: KVFacts, layer: int) -> int:
    """Bytes of K, or of V, of one block in one layer: [num_kv_heads, block_size, head_dim]."""
    return nbytes_of(kv.dtype, (kv.num_kv_heads[layer], kv.block_size, kv.head_dim[layer]))


def block_bytes(kv: KVFacts) -> int:
    """Bytes one block takes, K and V of every layer together."""
    return sum(2 * layer_block_bytes(kv, layer) for layer in range(len(kv.num_kv_heads)))


def token_bytes(kv: KVFacts) -> int:
    """Bytes of K and V of one token over all layers; window layers count in full, although they give old blocks back."""
    return block_bytes(kv) // kv.block_size
