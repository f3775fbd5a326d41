"""Tiles for plain_linear that a GPU may find faster than `tile_for`'s, without another bit in any result.

What decides a row's bits stays: steps of 64 along K, parts by N and K, all of a warp group's rows on the weight's side. What changes
is how much of the matrix a program holds, its warps, how far its loads run ahead, and, in prefill, whether TMA loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .triton_impl import DECODE_ROWS, Tile, tile_for

_SHARED_BYTES = 227 << 10
TMA_CAPABILITY = 90  # the first with the accelerator


def candidates(rows: int, *, tma: bool = False) -> Iterator[Tile]:
    """Tiles for this many bf16 rows, `tile_for`'s first; tma: of a GPU that has it."""
    import torch

    default = tile_for(rows, torch.bfloat16)
    yield default
    if rows <= DECODE_ROWS:
        shapes = [(64, default.block_t, 4), (128, default.block_t, 8)]
    else:
        shapes = [(128, 64, 4), (128, 128, 8), (128, 256, 8), (256, 64, 8), (256, 128, 8)]
    for block_n, block_t, warps in shapes:
        for stages in (3, 4, 5, 6, 8):
            tile = Tile(block_n=block_n, block_t=block_t, block_k=default.block_k, num_warps=warps, num_stages=stages)
            if (block_n + block_t) * tile.block_k * 2 * stages > _SHARED_BYTES:
                continue
            if tile != default:
                yield tile
            if tma and rows > DECODE_ROWS:
                yield replace(tile, tma=True)
