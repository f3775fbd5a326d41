"""Arguments of rope_kv_write, and running it on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Step:
    """The op's arguments, caches aside. q, k, v are slices of one tensor, as behind a merged linear."""

    tokens: int = 37
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    rotated: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    table_dtype: torch.dtype = torch.float32
    norm: tuple[float, bool] | None = (0.0, True)  # offset, round_first
    norm_dtype: torch.dtype = torch.float32

    def numbers(self, *shape: int, seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    @property
    def blocks(self) -> int:
        return 2 + 2 * self.tokens // self.block_size

    def inputs(self) -> tuple[Any, ...]:
        """(q, k, v, positions, cos, sin, weights, eps, offset, round_first) and (slots, group); every fifth token has no slot."""
        qkv = (3 * self.numbers(self.tokens, self.heads + 2 * self.kv_heads, self.dim, seed=0)).to(self.dtype)
        angles = torch.arange(100)[:, None] * 10.0 ** -(torch.arange(self.rotated) / self.rotated)
        tables = [angles.cos().to(self.table_dtype), angles.sin().to(self.table_dtype)]
        weights = [self.numbers(self.dim, seed=s).to(self.norm_dtype) if self.norm else None for s in (1, 2)]
        offset, round_first = self.norm or (0.0, False)
        positions = torch.randperm(100, generator=torch.Generator().manual_seed(3))[: self.tokens]
        slots = torch.randperm(self.blocks * self.block_size, generator=torch.Generator().manual_seed(4))[: self.tokens]
        slots[::5] = -1
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return (q, k, v, positions, *tables, *weights, 1e-6, offset, round_first), slots

    def caches(self) -> list[Tensor]:
        dtype = self.kv_dtype or self.dtype
        width = self.dim + (4 if dtype == torch.int8 else 0)
        return [torch.zeros(self.blocks, self.kv_heads, self.block_size, width, dtype=dtype) for _ in range(2)]


def run(op: Any, step: Step, rows: slice = slice(None), caches: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
    """The op on some of a step's tokens, with group 1 of two groups; group 0 holds what must not be read."""
    (q, k, v, positions, *rest), slots = step.inputs()
    caches = step.caches() if caches is None else caches
    groups = torch.stack([torch.full_like(slots[rows], 1 << 50), slots[rows]])
    return op(q[rows], k[rows], v[rows], positions[rows], *rest, *caches, groups, 1), caches
