"""The memory of the paged KV cache: one huge-page region, two tensors per layer."""

from __future__ import annotations

import re

import numpy as np

from llmc.artifacts.dtypes import NUMPY
from llmc.artifacts.kv_bytes import cache_shape
from llmc.artifacts.manifest import KVFacts
from llmc.runtime.memory import HUGE_PAGE_BYTES, allocate_huge, round_up

_CACHE_INPUT = re.compile(r"([kv])_cache\.([0-9]+)")


def cache_input(name: str) -> tuple[str, int] | None:
    """("k" or "v", layer) when the graph input `name` is a KV cache tensor."""
    match = _CACHE_INPUT.fullmatch(name)
    return (match[1], int(match[2])) if match else None


class KVCache:
    """K and V of every layer, each of `cache_shape`, zeroed. Pages appear when first written."""

    def __init__(self, kv: KVFacts, num_blocks: int) -> None:
        dtype = NUMPY[kv.dtype]
        shapes = [cache_shape(kv, layer, num_blocks) for layer in range(len(kv.head_dim))]
        sizes = [round_up(int(np.prod(shape)) * dtype.itemsize, HUGE_PAGE_BYTES) for shape in shapes]
        region = allocate_huge(2 * sum(sizes), what=f"a KV cache of {num_blocks} blocks")
        self._tensors: dict[tuple[str, int], np.ndarray] = {}
        start = 0
        for layer, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
            for part in "kv":
                used = int(np.prod(shape)) * dtype.itemsize
                self._tensors[part, layer] = region[start : start + used].view(dtype).reshape(shape)
                start += size

    def tensor(self, part: str, layer: int) -> np.ndarray:
        """The K or V tensor of a layer; bfloat16 is carried as uint16."""
        return self._tensors[part, layer]
