"""llmc::rope_kv_write in Triton: a program takes a few heads of one token through norm, rotation and the cache in one pass."""

# The parameters of kernels have types that only Triton knows.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fp8 import cache_value
from ..launch import FLOATS, H200, Device, Launch, Launcher, cdiv, dtype_reason, next_power_of_2, run
from ..registry import Implementation

MAX_HEADS_AT_ONCE = 4


@triton.jit
def _factor(weight, d, inside, offset):
    return tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)[None, :] + offset


@triton.jit
def _scaled(x, scale, factor, ROUND_FIRST: tl.constexpr, rounded: tl.constexpr):
    y = x * scale[:, None]
    if ROUND_FIRST:
        y = y.to(rounded).to(tl.float32)
    return (y * factor).to(rounded).to(tl.float32)


@triton.jit
def _turn(
    source, target, weight, cos, sin, write, head, num_heads, source_head, target_head, eps, offset,
    NORM: tl.constexpr, ROUND_FIRST: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """Some heads of q or k of one token, in three parts: dimensions [0, HALF), [HALF, 2 HALF), and the rest, which is not rotated."""
    i = tl.arange(0, BLOCK_HALF)
    inside = (head < num_heads)[:, None] & (i < HALF)[None, :]
    row = source + head[:, None] * source_head
    low = tl.load(row + i[None, :], mask=inside, other=0.0).to(tl.float32)
    high = tl.load(row + HALF + i[None, :], mask=inside, other=0.0).to(tl.float32)
    rounded: tl.constexpr = source.dtype.element_ty
    to = target + head[:, None] * target_head
    if BLOCK_TAIL > 0:
        j = 2 * HALF + tl.arange(0, BLOCK_TAIL)
        inside_tail = (head < num_heads)[:, None] & (j < D)[None, :]
        tail = tl.load(row + j[None, :], mask=inside_tail, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        if BLOCK_TAIL > 0:
            squares += tl.sum(tail * tail, 1)
        scale = tl.rsqrt(squares / D + eps)
        low = _scaled(low, scale, _factor(weight, i, i < HALF, offset), ROUND_FIRST, rounded)
        high = _scaled(high, scale, _factor(weight + HALF, i, i < HALF, offset), ROUND_FIRST, rounded)
        if BLOCK_TAIL > 0:
            tail = _scaled(tail, scale, _factor(weight, j, j < D, offset), ROUND_FIRST, rounded)
    cos_low = tl.load(cos + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    tl.store(to + i[None, :], cache_value((low * cos_low - high * sin_low).to(rounded), target), mask=inside & write)
    tl.store(to + HALF + i[None, :], cache_value((high * cos_high + low * sin_high).to(rounded), target), mask=inside & write)
    if BLOCK_TAIL > 0:
        tl.store(to + j[None, :], cache_value(tail.to(rounded), target), mask=inside_tail & write)


@triton.jit
def rope_kv_write_kernel(
    q, k, v, positions, cos, sin, q_weight, k_weight, out, k_cache, v_cache, slot_mapping, group_offset, eps, offset,
    q_token, q_head, k_token, k_head, v_token, v_head, table_row, num_heads, kv_heads,
    kc_block, kc_kv_head, kc_slot, vc_block, vc_kv_head, vc_slot,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, ROUND_FIRST: tl.constexpr, BLOCK_SIZE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_TAIL: tl.constexpr, HEADS: tl.constexpr,
    Q_PARTS: tl.constexpr, KV_PARTS: tl.constexpr,
):  # fmt: skip
    """Grid (token, part): parts are runs of HEADS heads of q, then of k, then of v."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slot_mapping + group_offset + token)
    block, place = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    # eps and offset arrive as fp64 from some callers
    eps32, offset32 = tl.cast(eps, tl.float32), tl.cast(offset, tl.float32)
    if part < Q_PARTS + KV_PARTS:
        position = tl.load(positions + token)
        cos_row, sin_row = cos + position * table_row, sin + position * table_row
        if part < Q_PARTS:
            head = part * HEADS + tl.arange(0, HEADS)
            _turn(
                q + token * q_token, out + token * num_heads * D, q_weight, cos_row, sin_row, token >= 0, head, num_heads, q_head, D,
                eps32, offset32, Q_NORM, ROUND_FIRST, D, HALF, BLOCK_HALF, BLOCK_TAIL,
            )  # fmt: skip
        else:
            head = (part - Q_PARTS) * HEADS + tl.arange(0, HEADS)
            _turn(
                k + token * k_token, k_cache + block * kc_block + place * kc_slot, k_weight, cos_row, sin_row, slot >= 0, head, kv_heads,
                k_head, kc_kv_head, eps32, offset32, K_NORM, ROUND_FIRST, D, HALF, BLOCK_HALF, BLOCK_TAIL,
            )  # fmt: skip
    else:
        head = (part - Q_PARTS - KV_PARTS) * HEADS + tl.arange(0, HEADS)
        d = tl.arange(0, BLOCK_D)
        inside = (head < kv_heads)[:, None] & (d < D)[None, :]
        tile = tl.load(v + token * v_token + head[:, None] * v_head + d[None, :], mask=inside, other=0.0)
        to = v_cache + block * vc_block + place * vc_slot + head[:, None] * vc_kv_head + d[None, :]
        tl.store(to, cache_value(tile, v_cache), mask=inside & (slot >= 0))


def rope_kv_write(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    eps: float, offset: float, round_first: bool, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, group: int, *,
    launch: Launcher = run, device: Device = H200,
) -> Tensor:  # fmt: skip
    """`rope_kv_write_reference` on a GPU."""
    num_tokens, num_heads, head_dim = q.shape
    kv_heads, rotated = k.shape[1], cos.shape[1]
    heads = min(MAX_HEADS_AT_ONCE, next_power_of_2(kv_heads))
    q_parts, kv_parts = cdiv(num_heads, heads), cdiv(kv_heads, heads)
    out = q.new_empty(q.shape)
    launch(
        Launch(
            kernel=rope_kv_write_kernel,
            grid=(num_tokens, q_parts + 2 * kv_parts, 1),
            args={
                "q": q, "k": k, "v": v, "positions": positions, "cos": cos, "sin": sin,
                "q_weight": q if q_weight is None else q_weight, "k_weight": k if k_weight is None else k_weight,
                "out": out, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slot_mapping,
                "group_offset": group * slot_mapping.stride(0), "eps": float(eps), "offset": float(offset),
                "q_token": q.stride(0), "q_head": q.stride(1), "k_token": k.stride(0), "k_head": k.stride(1),
                "v_token": v.stride(0), "v_head": v.stride(1), "table_row": cos.stride(0),
                "num_heads": num_heads, "kv_heads": kv_heads,
                "kc_block": k_cache.stride(0), "kc_kv_head": k_cache.stride(1), "kc_slot": k_cache.stride(2),
                "vc_block": v_cache.stride(0), "vc_kv_head": v_cache.stride(1), "vc_slot": v_cache.stride(2),
            },
            constants={
                "Q_NORM": q_weight is not None, "K_NORM": k_weight is not None, "ROUND_FIRST": round_first,
                "BLOCK_SIZE": k_cache.shape[2], "D": head_dim, "BLOCK_D": next_power_of_2(head_dim), "HALF": rotated // 2,
                "BLOCK_HALF": next_power_of_2(rotated // 2),
                "BLOCK_TAIL": next_power_of_2(head_dim - rotated) if head_dim > rotated else 0,
                "HEADS": heads, "Q_PARTS": q_parts, "KV_PARTS": kv_parts,
            },
            num_warps=max(1, min(4, heads * head_dim // 256)),
        )
    )  # fmt: skip
    return out


def rope_kv_write_reason(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    eps: float, offset: float, round_first: bool, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, group: int,
) -> str | None:  # fmt: skip
    """Why this kernel does not take the arguments, or None."""
    if any(t.stride(-1) != 1 for t in (q, k, v, positions, cos, sin, k_cache, v_cache, slot_mapping)):
        return "every tensor must be contiguous along its last dimension"
    if cos.stride(0) != sin.stride(0) or cos.dtype not in FLOATS or sin.dtype not in FLOATS:
        return "cos and sin must be floating tables of one layout"
    if cos.shape[1] < 2:
        return "nothing is rotated"
    if positions.dtype != torch.int64 or slot_mapping.dtype != torch.int64:
        return f"positions and slot_mapping must be int64, they are {positions.dtype} and {slot_mapping.dtype}"
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and (weight.dtype not in FLOATS or weight.stride(0) != 1):
            return f"{name} must be contiguous and floating"
    if k_cache.dtype == v_cache.dtype == torch.uint8:  # fp8 e4m3
        return dtype_reason(FLOATS, q=q, k=k, v=v)
    return dtype_reason(FLOATS, q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)


IMPLEMENTATIONS = (Implementation(op="rope_kv_write", name="triton", supports=rope_kv_write_reason, call=rope_kv_write),)
