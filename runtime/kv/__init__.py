"""The KV pool: blocks, who holds them, and how their content is found again. Plain Python; the device tensors are the executor's."""

from llmc.runtime.kv.block_pool import BlockPool
from llmc.runtime.kv.manager import KVManager, SequenceBlocks, max_tokens_that_fit, peak_blocks
from llmc.runtime.kv.prefix_cache import PrefixCache, PrefixHit

__all__ = ["BlockPool", "KVManager", "PrefixCache", "PrefixHit", "SequenceBlocks", "max_tokens_that_fit", "peak_blocks"]
