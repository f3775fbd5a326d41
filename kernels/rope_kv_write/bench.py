"""GB/s of rope_kv_write with the norms of q and k on a GPU: python -m llmc.kernels.rope_kv_write.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ..gpu_bench import DEVICE, Case, main, random


def arguments(tokens: int, heads: int, kv_heads: int, dim: int) -> tuple[Any, ...]:
    q, k, v = random(tokens, heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], dim=1)
    blocks = tokens // 16 + 1
    caches = [random(blocks, kv_heads, 16, dim) for _ in range(2)]
    slots = torch.randperm(blocks * 16, device=DEVICE)[:tokens].view(1, -1)
    tables = [random(4096, dim, dtype=torch.float32) for _ in range(2)]
    positions = torch.randint(0, 4096, (tokens,), device=DEVICE)
    return (q, k, v, positions, *tables, random(dim), random(dim), 1e-6, 0.0, True, *caches, slots, 0)


def cases() -> Iterator[Case]:
    from .triton_impl import rope_kv_write

    for tokens in (1, 64, 256, 2048, 8192):
        for heads, kv_heads in ((16, 8), (32, 8)):
            yield Case(
                name=f"rope_kv_write {tokens} tokens, {heads}/{kv_heads} heads",
                make=partial(arguments, tokens, heads, kv_heads, 128),
                ours=rope_kv_write,
                moved_bytes=2 * tokens * (heads + 2 * kv_heads) * 128 * 2,
            )


if __name__ == "__main__":
    main(cases)
