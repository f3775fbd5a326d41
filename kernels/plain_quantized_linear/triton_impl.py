"""llmc::plain_quantized_linear in Triton: plain_linear whose weights become x's dtype on the way to the matrix instruction.

Parts, tiles and the order of a row's sum are plain_linear's, so a row has the same bits at every number of rows, and in 16-bit types
those that plain_linear gives with the dequantised matrix.
"""

# The parameters of kernels have types that only Triton knows.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fp8 import as_bytes, from_fp8
from ..launch import FLOATS, H200, Device, Launcher, as_rows, cdiv, dtype_reason, row_reason, run
from ..plain_linear.triton_impl import Tile, launch_product, place_tile, split_length, tile_for
from ..registry import Implementation
from .reference import HALF, RUN


@triton.jit
def _scaled(q, scales, scale_N, has_N, k, group, dtype: tl.constexpr):
    scale = tl.load(scales + scale_N + k // group, mask=has_N, other=0.0).to(tl.float32)
    return (q * scale[:, None]).to(dtype)


@triton.jit
def _halves(weight, row_N, has_N, start, last, BITS: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """fp32 [BLOCK_N, BLOCK] twice: the inputs [start, start + BLOCK) and the BLOCK after them."""
    j = tl.arange(0, BLOCK)
    if BITS == 4:  # a run is whole, also the last
        both = tl.load(weight + row_N[:, None] + (start // 2 + j)[None, :], mask=has_N[:, None], other=0x88).to(tl.int32)
        low, high = ((both & 15) - 8).to(tl.float32), ((both >> 4) - 8).to(tl.float32)
    else:
        has_low, has_high = has_N[:, None], has_N[:, None]
        if not EVEN:
            has_low = has_low & (start + j < last)[None, :]
            has_high = has_high & (start + BLOCK + j < last)[None, :]
        at = weight + row_N[:, None] + (start + j)[None, :]
        low, high = tl.load(at, mask=has_low, other=0), tl.load(at + BLOCK, mask=has_high, other=0)
        if BITS == 0:
            low, high = from_fp8(low), from_fp8(high)
        else:
            low, high = low.to(tl.float32), high.to(tl.float32)
    return low, high


@triton.jit
def quantized_dot(
    x, weight, scales, token_T, has_T, row_N, scale_N, has_N, first, last, k, group,
    BITS: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_T] fp32, as `weight_dot`. first is a multiple of 2 * BLOCK_HALF. BITS 0 stands for fp8."""
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    dtype: tl.constexpr = x.dtype.element_ty
    for start in range(first, last, 2 * BLOCK_HALF):
        low, high = _halves(weight, row_N, has_N, start, last, BITS, EVEN, BLOCK_HALF)
        at = start + tl.arange(0, BLOCK_HALF)
        has_low, has_high = has_T[None, :], has_T[None, :]
        if not EVEN:
            has_low = has_low & (at < last)[:, None]
            has_high = has_high & (at + BLOCK_HALF < last)[:, None]
        tokens = x + token_T[None, :] + at[:, None]
        x_low, x_high = tl.load(tokens, mask=has_low, other=0.0), tl.load(tokens + BLOCK_HALF, mask=has_high, other=0.0)
        w_low = _scaled(low, scales, scale_N, has_N, start, group, dtype)
        total = tl.dot(w_low, x_low, total, input_precision="ieee")
        # a last run may end before its second half, whose scale is then not there to be read
        w_high = _scaled(high, scales, scale_N, has_N, tl.minimum(start + BLOCK_HALF, k - 1), group, dtype)
        total = tl.dot(w_high, x_high, total, input_precision="ieee")
    return total


@triton.jit
def quantized_decode_kernel(
    x, weight, scales, bias, out, num_tokens, n, k, x_stride, weight_stride, scale_stride, group, length,
    HAS_BIAS: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Grid (run of columns, run of tokens, part of K). `out` is the result, or [parts, tokens, n] fp32."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(2)
    has_N, has_T = row < n, token < num_tokens
    row_N = row.to(tl.int64)
    first = part * length
    y = quantized_dot(
        x, weight, scales, token.to(tl.int64) * x_stride, has_T, row_N * weight_stride, row_N * scale_stride, has_N,
        first, tl.minimum(first + length, k), k, group, BITS, EVEN, BLOCK_N, BLOCK_T, BLOCK_HALF,
    )  # fmt: skip
    if HAS_BIAS:
        y += tl.load(bias + row, mask=has_N, other=0.0).to(tl.float32)[:, None]
    place = (part.to(tl.int64) * num_tokens + token)[None, :] * n + row[:, None]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=has_N[:, None] & has_T[None, :])


@triton.jit
def quantized_prefill_kernel(
    x, weight, scales, bias, out, num_tokens, n, k, x_stride, weight_stride, scale_stride, group, length, num_tiles,
    HAS_BIAS: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_HALF: tl.constexpr, ABREAST: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Grid (PROGRAMS), as plain_linear's `prefill_kernel`."""
    for tile in range(tl.program_id(0), num_tiles, PROGRAMS):
        token, row = place_tile(tile, num_tokens, n, BLOCK_N, BLOCK_T, ABREAST)
        has_N, has_T = row < n, token < num_tokens
        row_N = row.to(tl.int64)
        token_T = token.to(tl.int64) * x_stride
        y = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for part in range(PARTS):
            first = part * length
            y += quantized_dot(
                x, weight, scales, token_T, has_T, row_N * weight_stride, row_N * scale_stride, has_N,
                first, tl.minimum(first + length, k), k, group, BITS, EVEN, BLOCK_N, BLOCK_T, BLOCK_HALF,
            )  # fmt: skip
        if HAS_BIAS:
            y += tl.load(bias + row, mask=has_N, other=0.0).to(tl.float32)[:, None]
        place = token.to(tl.int64)[None, :] * n + row[:, None]
        tl.store(out + place, y.to(out.dtype.element_ty), mask=has_N[:, None] & has_T[None, :])


def plain_quantized_linear(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, group: int, *, launch: Launcher = run, device: Device = H200
) -> Tensor:
    """`plain_quantized_linear_reference` on a GPU."""
    rows, n, k = as_rows(x), weight.shape[0], x.shape[-1]
    num_tokens = rows.shape[0]
    out = x.new_empty((*x.shape[:-1], n))
    tile = quantized_tile(num_tokens, x.dtype)
    length = split_length(n, k, RUN, device)
    parts, bits = cdiv(k, length), {torch.uint8: 4, torch.int8: 8, torch.float8_e4m3fn: 0}[weight.dtype]
    stored = as_bytes(weight)
    args: dict[str, Any] = {
        "x": rows, "weight": stored, "scales": scales, "bias": scales if bias is None else bias, "out": out, "num_tokens": num_tokens,
        "n": n, "k": k, "x_stride": rows.stride(0), "weight_stride": stored.stride(0), "scale_stride": scales.stride(0), "group": group,
        "length": length,
    }  # fmt: skip
    constants = {
        "HAS_BIAS": bias is not None, "BITS": bits, "EVEN": k % RUN == 0, "BLOCK_N": tile.block_n, "BLOCK_T": tile.block_t,
        "BLOCK_HALF": HALF,
    }  # fmt: skip
    kernels = (quantized_decode_kernel, quantized_prefill_kernel)
    return launch_product(*kernels, args, constants, out, bias, parts, tile, launch=launch, device=device)


def quantized_tile(rows: int, dtype: torch.dtype) -> Tile:
    """plain_linear's tile, its steps along K one run of 64 inputs."""
    tile = tile_for(rows, dtype)
    return dataclasses.replace(tile, block_k=RUN, num_stages=min(tile.num_stages, 4))


def plain_quantized_linear_reason(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, group: int) -> str | None:
    """Why this kernel does not take the arguments, or None."""
    if 0 in weight.shape:
        return f"an empty weight {list(weight.shape)}"
    if weight.stride(1) != 1 or scales.stride(1) != 1 or (bias is not None and bias.stride(0) != 1):
        return "weight, scales and bias must be contiguous along their last dimension"
    return dtype_reason(FLOATS, x=x, scales=scales, bias=bias) or row_reason(x=x)


IMPLEMENTATIONS = (
    Implementation(op="plain_quantized_linear", name="triton", supports=plain_quantized_linear_reason, call=plain_quantized_linear),
)
