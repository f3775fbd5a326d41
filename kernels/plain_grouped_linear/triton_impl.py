"""llmc::plain_grouped_linear in Triton: rows are put in the order of their experts, then multiplied tile by tile.

An expert's rows fill tiles of its own. Counting and placing are done without atomic additions, so that a row's place is fixed; its
bits do not depend on the place anyway, since a row's sum over K has one order.
"""

# The parameters of kernels have types that only Triton knows.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import FLOATS, H200, Device, Launch, Launcher, cdiv, dtype_reason, next_power_of_2, run
from ..plain_linear.triton_impl import Tile, stages_of, tile_for, weight_dot
from ..registry import Implementation

SCAN = 1024  # rows looked at together


@triton.jit
def count_kernel(expert_ids, counts, num_rows, BLOCK: tl.constexpr):
    """Grid (expert): how many rows are its own."""
    expert = tl.program_id(0)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        count += (tl.load(expert_ids + row, mask=row < num_rows, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(count, 0))


@triton.jit
def place_kernel(
    expert_ids, counts, rows, tile_experts, num_rows, num_experts, max_tiles,
    BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Grid (expert): the rows of its tiles (-1 where a tile is not full), and whose tiles they are (-1 past the last)."""
    expert = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    tiles_E = tl.cdiv(tl.load(counts + e, mask=e < num_experts, other=0), BLOCK_T)
    first = tl.sum(tl.where(e < expert, tiles_E, 0), 0)
    tiles = tl.sum(tl.where(e == expert, tiles_E, 0), 0)
    placed = tl.load(counts + expert) * 0
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mine = (tl.load(expert_ids + row, mask=row < num_rows, other=-1) == expert).to(tl.int32)
        rank = placed + tl.cumsum(mine, 0) - 1
        tl.store(rows + first * BLOCK_T + rank, row, mask=mine > 0)
        placed += tl.sum(mine, 0)
    rest = placed + tl.arange(0, BLOCK_T)
    tl.store(rows + first * BLOCK_T + rest, tl.full([BLOCK_T], -1, tl.int32), mask=rest < tiles * BLOCK_T)
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        tl.store(tile_experts + first + tile, tl.zeros([BLOCK_TILES], tl.int32) + expert, mask=tile < tiles)
    if expert == num_experts - 1:
        for start in range(first + tiles, max_tiles, BLOCK_TILES):
            tile = start + tl.arange(0, BLOCK_TILES)
            tl.store(tile_experts + tile, tl.full([BLOCK_TILES], -1, tl.int32), mask=tile < max_tiles)


@triton.jit
def grouped_kernel(
    x, weight, bias, out, rows, tile_experts, n, k, x_stride, weight_expert, weight_stride, bias_expert,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (run of columns, tile of rows)."""
    tile = tl.program_id(1)
    expert = tl.load(tile_experts + tile).to(tl.int64)
    if expert >= 0:
        token = tl.load(rows + tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        has_N, has_T = column < n, token >= 0
        y = weight_dot(
            x, weight + expert * weight_expert, token * x_stride, has_T, column.to(tl.int64) * weight_stride, has_N, 0, k,
            EVEN, BLOCK_N, BLOCK_T, BLOCK_K,
        )  # fmt: skip
        if HAS_BIAS:
            y += tl.load(bias + expert * bias_expert + column, mask=has_N, other=0.0).to(tl.float32)[:, None]
        tl.store(out + token[None, :] * n + column[:, None], y.to(out.dtype.element_ty), mask=has_N[:, None] & has_T[None, :])


def plain_grouped_linear(
    x: Tensor, weight: Tensor, expert_ids: Tensor, bias: Tensor | None, *, launch: Launcher = run, device: Device = H200
) -> Tensor:
    """`plain_grouped_linear_reference` on a GPU."""
    num_rows, k = x.shape
    num_experts, n, _ = weight.shape
    tile = _tile(num_rows, num_experts, x.dtype)
    max_tiles = min(num_rows, num_rows // tile.block_t + num_experts)
    out = x.new_empty((num_rows, n))
    counts = expert_ids.new_empty((num_experts,), dtype=torch.int32)
    rows = expert_ids.new_empty((max_tiles * tile.block_t,), dtype=torch.int32)
    tile_experts = expert_ids.new_empty((max_tiles,), dtype=torch.int32)
    any_rows = num_experts if num_rows else 0
    launch(
        Launch(
            kernel=count_kernel,
            grid=(any_rows, 1, 1),
            args={"expert_ids": expert_ids, "counts": counts, "num_rows": num_rows},
            constants={"BLOCK": min(SCAN, next_power_of_2(num_rows))},
        )
    )
    launch(
        Launch(
            kernel=place_kernel,
            grid=(any_rows, 1, 1),
            args={
                "expert_ids": expert_ids, "counts": counts, "rows": rows, "tile_experts": tile_experts, "num_rows": num_rows,
                "num_experts": num_experts, "max_tiles": max_tiles,
            },
            constants={
                "BLOCK": min(SCAN, next_power_of_2(num_rows)), "BLOCK_E": next_power_of_2(num_experts), "BLOCK_T": tile.block_t,
                "BLOCK_TILES": 64,
            },
        )
    )  # fmt: skip
    launch(
        Launch(
            kernel=grouped_kernel,
            grid=(cdiv(n, tile.block_n), max_tiles, 1),
            args={
                "x": x, "weight": weight, "bias": weight if bias is None else bias, "out": out, "rows": rows,
                "tile_experts": tile_experts, "n": n, "k": k, "x_stride": x.stride(0), "weight_expert": weight.stride(0),
                "weight_stride": weight.stride(1), "bias_expert": 0 if bias is None else bias.stride(0),
            },
            constants={
                "HAS_BIAS": bias is not None, "EVEN": k % tile.block_k == 0, "BLOCK_N": tile.block_n, "BLOCK_T": tile.block_t,
                "BLOCK_K": tile.block_k,
            },
            num_warps=tile.num_warps,
            num_stages=stages_of(tile, x.itemsize, device),
        )
    )  # fmt: skip
    return out


def _tile(num_rows: int, num_experts: int, dtype: torch.dtype) -> Tile:
    """A tile as high as an expert's share of the rows, were they spread evenly."""
    share = cdiv(num_rows, num_experts)
    return tile_for(min(share, 16) if share <= 32 else 65 if share <= 512 else share, dtype)


def plain_grouped_linear_reason(x: Tensor, weight: Tensor, expert_ids: Tensor, bias: Tensor | None) -> str | None:
    """Why these kernels do not take the arguments, or None."""
    if 0 in weight.shape:
        return f"an empty weight {list(weight.shape)}"
    if x.stride(1) != 1 or weight.stride(2) != 1 or expert_ids.stride(0) != 1 or (bias is not None and bias.stride(1) != 1):
        return "every tensor must be contiguous along its last dimension"
    return dtype_reason(FLOATS, x=x, weight=weight, bias=bias)


IMPLEMENTATIONS = (
    Implementation(op="plain_grouped_linear", name="triton", supports=plain_grouped_linear_reason, call=plain_grouped_linear),
)
