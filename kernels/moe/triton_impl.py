"""The mixture-of-experts ops in Triton.

Sorting counts and places without atomic additions, so a row's place is fixed, and in runs, so that its time does not grow as experts
times rows in one program. A row's bits depend neither on its place nor on its batch: its sum over K has one order, as in plain_linear
without parts.
"""

# The parameters of kernels have types that only Triton knows.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import FLOATS, H200, Argument, Device, Launch, Launcher, cdiv, dtype_reason, next_power_of_2, run
from ..plain_linear.triton_impl import stages_of, tile_for, weight_dot
from ..registry import Implementation
from .reference import most_tiles

MAX_EXPERTS = 1024
RUN = 256  # rows that one program of the sort counts and places


@triton.jit
def route_kernel(
    logits, weights, ids, num_experts, stride,
    TOP_K: tl.constexpr, BLOCK_K: tl.constexpr, SOFTMAX_FIRST: tl.constexpr, RENORMALISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (token)."""
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    score = tl.load(logits + token * stride + e, mask=e < num_experts, other=float("-inf")).to(tl.float32)
    score = tl.where(score == score, score, float("-inf"))
    peak = tl.max(score, 0)
    left = score
    free = e < num_experts  # not chosen yet; tells a chosen expert from one at minus infinity
    place = tl.arange(0, BLOCK_K)
    best = tl.full([BLOCK_K], float("-inf"), tl.float32)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    for i in tl.static_range(TOP_K):
        top = tl.max(left, 0)
        at = tl.min(tl.where(free & (left == top), e, BLOCK), 0)
        best = tl.where(place == i, top, best)
        chosen = tl.where(place == i, at, chosen)
        free = free & (e != at)
        left = tl.where(free, score, float("-inf"))
    weight = tl.where(place < TOP_K, tl.exp(best - peak), 0.0)
    if SOFTMAX_FIRST:
        weight = weight / tl.sum(tl.exp(score - peak), 0)
        if RENORMALISE:
            weight = weight / tl.sum(weight, 0)
    else:
        weight = weight / tl.sum(weight, 0)
    to = token * TOP_K + place
    tl.store(weights + to, weight.to(weights.dtype.element_ty), mask=place < TOP_K)
    tl.store(ids + to, chosen.to(tl.int64), mask=place < TOP_K)


@triton.jit
def count_runs_kernel(expert_ids, counts, num_rows, num_experts, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Grid (run of rows): how many of its rows go to each expert; counts is [runs, E]."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(expert_ids + row, mask=row < num_rows, other=-1)
    inside = (expert >= 0) & (expert < num_experts)
    found = tl.histogram(tl.where(inside, expert, 0).to(tl.int32), BLOCK_E, mask=inside)
    e = tl.arange(0, BLOCK_E)
    tl.store(counts + tl.program_id(0) * num_experts + e, found, mask=e < num_experts)


@triton.jit
def place_runs_kernel(
    expert_ids, counts, starts, rows, tile_experts, num_rows, num_experts, num_runs, max_tiles,
    BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_TILES: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Grid (expert): where each run's rows of it begin, whose its tiles are, -1 into what its last tile lacks."""
    expert = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.int32)
    for r in range(num_runs):
        total += tl.load(counts + r * num_experts + e, mask=e < num_experts, other=0)
    tiles_E = tl.cdiv(total, BLOCK_T)
    first = tl.sum(tl.where(e < expert, tiles_E, 0), 0)
    tiles = tl.sum(tl.where(e == expert, tiles_E, 0), 0)
    mine = tl.sum(tl.where(e == expert, total, 0), 0)
    begin = first * BLOCK_T
    for start in range(0, num_runs, AT_ONCE):
        some = start + tl.arange(0, AT_ONCE)
        found = tl.load(counts + some * num_experts + expert, mask=some < num_runs, other=0)
        tl.store(starts + some * num_experts + expert, begin + tl.cumsum(found, 0) - found, mask=some < num_runs)
        begin += tl.sum(found, 0)
    rest = mine + tl.arange(0, BLOCK_T)
    tl.store(rows + first * BLOCK_T + rest, tl.full([BLOCK_T], -1, tl.int32), mask=rest < tiles * BLOCK_T)
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        tl.store(tile_experts + first + tile, tl.zeros([BLOCK_TILES], tl.int32) + expert, mask=tile < tiles)
    if expert == num_experts - 1:
        for start in range(first + tiles, max_tiles, BLOCK_TILES):
            tile = start + tl.arange(0, BLOCK_TILES)
            tl.store(tile_experts + tile, tl.full([BLOCK_TILES], -1, tl.int32), mask=tile < max_tiles)


@triton.jit
def fill_runs_kernel(expert_ids, starts, rows, num_rows, num_experts, BLOCK: tl.constexpr, SLICE: tl.constexpr):
    """Grid (run of rows): each row to its place, behind the rows before it of the same expert in the run."""
    begin = tl.program_id(0) * BLOCK
    row = begin + tl.arange(0, BLOCK)
    expert = tl.load(expert_ids + row, mask=row < num_rows, other=-1).to(tl.int32)
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, BLOCK, SLICE):  # a slice of earlier rows at a time, as a [BLOCK, SLICE] comparison
        other = begin + start + tl.arange(0, SLICE)
        theirs = tl.load(expert_ids + other, mask=other < num_rows, other=-1).to(tl.int32)
        before = (theirs[None, :] == expert[:, None]) & (other[None, :] < row[:, None])
        rank += tl.sum(before.to(tl.int32), 1)
    inside = (expert >= 0) & (expert < num_experts)
    place = tl.load(starts + tl.program_id(0) * num_experts + expert, mask=inside, other=0) + rank
    tl.store(rows + place, row, mask=inside)


@triton.jit
def moe_linear_kernel(
    x, weight, bias, out, rows, tile_experts, n, k, x_stride, weight_expert, weight_stride, bias_expert, rows_per_token,
    SHARE: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (run of columns, tile of rows), SHARE tiles to one of moe_sort's."""
    tile = tl.program_id(1)
    expert = tl.load(tile_experts + tile // SHARE).to(tl.int64)
    if expert >= 0:
        row = tl.load(rows + tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        has_N, has_T = column < n, row >= 0
        y = weight_dot(
            x, weight + expert * weight_expert, row // rows_per_token * x_stride, has_T, column.to(tl.int64) * weight_stride, has_N, 0, k,
            EVEN, BLOCK_N, BLOCK_T, BLOCK_K,
        )  # fmt: skip
        if HAS_BIAS:
            y += tl.load(bias + expert * bias_expert + column, mask=has_N, other=0.0).to(tl.float32)[:, None]
        tl.store(out + row[None, :] * n + column[:, None], y.to(out.dtype.element_ty), mask=has_N[:, None] & has_T[None, :])


@triton.jit
def combine_kernel(y, weights, out, n, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (token, run of columns)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOP_K):
        row = token * TOP_K + choice
        weight = tl.load(weights + row).to(tl.float32)
        total += tl.load(y + row * n + column, mask=inside, other=0.0).to(tl.float32) * weight
    tl.store(out + token * n + column, total.to(out.dtype.element_ty), mask=inside)


def moe_route(
    logits: Tensor, top_k: int, softmax_first: bool, renormalise: bool, wide: bool, *, launch: Launcher = run, device: Device = H200
) -> tuple[Tensor, Tensor]:
    """`moe_route_reference` on a GPU."""
    num_tokens, num_experts = logits.shape
    weights = logits.new_empty((num_tokens, top_k), dtype=torch.float32 if wide else logits.dtype)
    ids = logits.new_empty((num_tokens, top_k), dtype=torch.int64)
    launch(
        Launch(
            kernel=route_kernel,
            grid=(num_tokens, 1, 1),
            args={
                "logits": logits, "weights": weights, "ids": ids, "num_experts": num_experts, "stride": logits.stride(0),
            },
            constants={
                "TOP_K": top_k, "BLOCK_K": next_power_of_2(top_k), "SOFTMAX_FIRST": softmax_first, "RENORMALISE": renormalise,
                "BLOCK": next_power_of_2(num_experts),
            },
            num_warps=1,
        )
    )  # fmt: skip
    return weights, ids


def moe_sort(expert_ids: Tensor, num_experts: int, tile: int, *, launch: Launcher = run, device: Device = H200) -> tuple[Tensor, Tensor]:
    """`moe_sort_reference` on a GPU."""
    num_rows = expert_ids.numel()
    num_tiles, num_runs = most_tiles(num_rows, num_experts, tile), cdiv(num_rows, RUN)
    rows = expert_ids.new_empty((num_tiles * tile,), dtype=torch.int32)
    tile_experts = expert_ids.new_empty((num_tiles,), dtype=torch.int32)
    counts, starts = (expert_ids.new_empty((num_runs, num_experts), dtype=torch.int32) for _ in range(2))
    common: dict[str, Argument] = {"expert_ids": expert_ids, "num_rows": num_rows, "num_experts": num_experts}
    block, block_e = min(RUN, max(16, next_power_of_2(num_rows))), next_power_of_2(num_experts)
    launch(
        Launch(
            kernel=count_runs_kernel,
            grid=(num_runs, 1, 1),
            args={**common, "counts": counts},
            constants={"BLOCK": block, "BLOCK_E": block_e},
            num_warps=4,
        )
    )
    launch(
        Launch(
            kernel=place_runs_kernel,
            grid=(num_experts if num_rows else 0, 1, 1),
            args={
                **common, "counts": counts, "starts": starts, "rows": rows, "tile_experts": tile_experts, "num_runs": num_runs,
                "max_tiles": num_tiles,
            },
            constants={"BLOCK_E": block_e, "BLOCK_T": tile, "BLOCK_TILES": 64, "AT_ONCE": min(64, next_power_of_2(num_runs))},
            num_warps=4,
        )
    )  # fmt: skip
    launch(
        Launch(
            kernel=fill_runs_kernel,
            grid=(num_runs, 1, 1),
            args={**common, "starts": starts, "rows": rows},
            constants={"BLOCK": block, "SLICE": min(16, block)},
            num_warps=4,
        )
    )
    return rows, tile_experts


def moe_linear(
    x: Tensor, weight: Tensor, rows: Tensor, tile_experts: Tensor, bias: Tensor | None, num_rows: int, rows_per_token: int, *,
    launch: Launcher = run, device: Device = H200,
) -> Tensor:  # fmt: skip
    """`moe_linear_reference` on a GPU."""
    (_, n, k), num_tiles = weight.shape, tile_experts.shape[0]
    out = x.new_empty((num_rows, n))
    sorted_rows = rows.shape[0] // max(1, num_tiles) or 16
    tile = tile_for({16: 16, 32: 32, 64: 65, 128: 513}[sorted_rows], x.dtype)
    share = sorted_rows // tile.block_t  # fp32 tiles are lower
    launch(
        Launch(
            kernel=moe_linear_kernel,
            grid=(cdiv(n, tile.block_n), num_tiles * share, 1),
            args={
                "x": x, "weight": weight, "bias": weight if bias is None else bias, "out": out, "rows": rows, "tile_experts": tile_experts,
                "n": n, "k": k, "x_stride": x.stride(0), "weight_expert": weight.stride(0), "weight_stride": weight.stride(1),
                "bias_expert": 0 if bias is None else bias.stride(0), "rows_per_token": rows_per_token,
            },
            constants={
                "SHARE": share, "HAS_BIAS": bias is not None, "EVEN": k % tile.block_k == 0, "BLOCK_N": tile.block_n,
                "BLOCK_T": tile.block_t, "BLOCK_K": tile.block_k,
            },
            num_warps=tile.num_warps,
            num_stages=stages_of(tile, x.itemsize, device),
        )
    )  # fmt: skip
    return out


def moe_combine(y: Tensor, weights: Tensor, *, launch: Launcher = run, device: Device = H200) -> Tensor:
    """`moe_combine_reference` on a GPU."""
    (num_tokens, top_k), n = weights.shape, y.shape[1]
    out = y.new_empty((num_tokens, n))
    block = min(1024, next_power_of_2(n))
    launch(
        Launch(
            kernel=combine_kernel,
            grid=(num_tokens, cdiv(n, block), 1),
            args={"y": y, "weights": weights, "out": out, "n": n},
            constants={"TOP_K": top_k, "BLOCK": block},
        )
    )
    return out


def moe_route_reason(logits: Tensor, top_k: int, softmax_first: bool, renormalise: bool, wide: bool) -> str | None:
    """Why this kernel does not take the logits, or None."""
    if logits.stride(1) != 1:
        return "rows of logits must be contiguous"
    if logits.shape[1] > MAX_EXPERTS:
        return f"{logits.shape[1]} experts; it takes up to {MAX_EXPERTS}"
    return dtype_reason(FLOATS, logits=logits)


def moe_sort_reason(expert_ids: Tensor, num_experts: int, tile: int) -> str | None:
    """Why these kernels do not take the ids, or None."""
    if not expert_ids.is_contiguous():
        return "expert_ids must be contiguous"
    return None if 0 < num_experts <= MAX_EXPERTS else f"{num_experts} experts; it takes 1 to {MAX_EXPERTS}"


def moe_linear_reason(
    x: Tensor, weight: Tensor, rows: Tensor, tile_experts: Tensor, bias: Tensor | None, num_rows: int, rows_per_token: int
) -> str | None:
    """Why this kernel does not take the arguments, or None."""
    if 0 in weight.shape:
        return f"an empty weight {list(weight.shape)}"
    if x.stride(1) != 1 or weight.stride(2) != 1 or (bias is not None and bias.stride(1) != 1):
        return "every tensor must be contiguous along its last dimension"
    return dtype_reason(FLOATS, x=x, weight=weight, bias=bias)


def moe_combine_reason(y: Tensor, weights: Tensor) -> str | None:
    """Why this kernel does not take the arguments, or None."""
    if not y.is_contiguous() or not weights.is_contiguous():
        return "y and weights must be contiguous"
    return dtype_reason(FLOATS, y=y) or dtype_reason(FLOATS, weights=weights)


IMPLEMENTATIONS = (
    Implementation(op="moe_route", name="triton", supports=moe_route_reason, call=moe_route),
    Implementation(op="moe_sort", name="triton", supports=moe_sort_reason, call=moe_sort),
    Implementation(op="moe_linear", name="triton", supports=moe_linear_reason, call=moe_linear),
    Implementation(op="moe_combine", name="triton", supports=moe_combine_reason, call=moe_combine),
)
