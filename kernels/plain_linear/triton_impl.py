"""llmc::plain_linear in Triton: up to 64 rows (decode) with K split over programs, more rows (prefill) by persistent programs.

A row has the same bits at every number of rows. Its sum over K is cut into the same parts, each summed from zero in steps of the same
matrix instruction and added in order: by a second kernel in decode, by the one program that holds the tile in prefill. The parts
depend on N, K and the device alone. The weight stands on the side of the instruction that is always 64 rows high, so that a single
token fills an instruction as well as many do, and only the other side's width depends on the number of tokens.
"""

# The parameters of kernels have types that only Triton knows.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import FLOATS, H200, Device, Launch, Launcher, as_rows, cdiv, dtype_reason, fitting_stages, next_power_of_2, row_reason, run
from ..registry import Implementation

DECODE_ROWS = 64
MIN_STEPS = 8  # of BLOCK_K in a part of K: fewer do not fill the pipeline
MAX_PARTS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """What one program computes at a time: block_n columns of the result for block_t rows.

    tma: a prefill kernel's loads are the tensor memory accelerator's, from compute capability 9.0 on, where the operands' rows allow it.
    """

    block_n: int
    block_t: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False


def tile_for(rows: int, dtype: torch.dtype) -> Tile:
    """The tile for this many rows (tokens). block_k is the same for all of one dtype."""
    if dtype == torch.float32:  # no matrix instruction; for checks against other programs, not for speed
        return Tile(block_n=32, block_t=16 if rows <= 16 else 32, block_k=32, num_warps=4, num_stages=2)
    if rows <= DECODE_ROWS:
        return Tile(block_n=64, block_t=max(16, next_power_of_2(rows)), block_k=64, num_warps=4, num_stages=6)
    if rows <= 512:
        return Tile(block_n=128, block_t=64, block_k=64, num_warps=4, num_stages=4)
    return Tile(block_n=128, block_t=128, block_k=64, num_warps=8, num_stages=4)


def stages_of(tile: Tile, itemsize: int, device: Device) -> int:
    """The tile's stages, fewer where the device has little shared memory."""
    return fitting_stages(tile.num_stages, (tile.block_n + tile.block_t) * tile.block_k * itemsize, device)


def split_length(n: int, k: int, block_k: int, device: Device) -> int:
    """Columns of K in a part, a multiple of block_k: as many parts as keep the device busy when there is one row."""
    programs, parts = cdiv(n, 64), 1
    while programs * parts < device.num_sms * 3 // 2 and parts < MAX_PARTS and k >= 2 * parts * MIN_STEPS * block_k:
        parts *= 2
    return cdiv(cdiv(k, block_k), parts) * block_k


@triton.jit
def weight_dot(
    x, weight, token_T, has_T, row_N, has_N, first, last,
    EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_T] fp32: rows of the weight times tokens over the columns [first, last); token_T, row_N: where they begin."""
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for start in range(first, last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        has_w, has_x = has_N[:, None], has_T[None, :]
        if not EVEN:
            has_w = has_w & (k < last)[None, :]
            has_x = has_x & (k < last)[:, None]
        w = tl.load(weight + row_N[:, None] + k[None, :], mask=has_w, other=0.0)
        tokens = tl.load(x + token_T[None, :] + k[:, None], mask=has_x, other=0.0)
        total = tl.dot(w, tokens, total, input_precision="ieee")
    return total


@triton.jit
def decode_kernel(
    x, weight, bias, out, num_tokens, n, k, x_stride, weight_stride, length,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (run of columns, run of tokens, part of K). `out` is the result, or [parts, tokens, n] fp32 for `add_kernel`."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(2)
    has_N, has_T = row < n, token < num_tokens
    first = part * length
    y = weight_dot(
        x, weight, token.to(tl.int64) * x_stride, has_T, row.to(tl.int64) * weight_stride, has_N, first, tl.minimum(first + length, k),
        EVEN, BLOCK_N, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        y += tl.load(bias + row, mask=has_N, other=0.0).to(tl.float32)[:, None]
    place = (part.to(tl.int64) * num_tokens + token)[None, :] * n + row[:, None]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=has_N[:, None] & has_T[None, :])


@triton.jit
def add_kernel(partial, bias, out, num_tokens, n, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (token, run of columns): the parts in their order, then the bias."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    y = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        y += tl.load(partial + (part * num_tokens + token) * n + column, mask=inside, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * n + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def tile_corner(tile, num_tokens, n, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, ABREAST: tl.constexpr):
    """The first token and the first of the weight's rows of a tile; neighbouring tiles are ABREAST runs of tokens by one run of rows."""
    runs_T, runs_N = tl.cdiv(num_tokens, BLOCK_T), tl.cdiv(n, BLOCK_N)
    band = tile // (ABREAST * runs_N)
    width = tl.minimum(runs_T - band * ABREAST, ABREAST)
    inside = tile % (ABREAST * runs_N)
    return (band * ABREAST + inside % width) * BLOCK_T, (inside // width) * BLOCK_N


@triton.jit
def place_tile(tile, num_tokens, n, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, ABREAST: tl.constexpr):
    """The tokens and the weight's rows of a tile."""
    token, row = tile_corner(tile, num_tokens, n, BLOCK_N, BLOCK_T, ABREAST)
    return token + tl.arange(0, BLOCK_T), row + tl.arange(0, BLOCK_N)


@triton.jit
def prefill_kernel(
    x, weight, bias, out, num_tokens, n, k, x_stride, weight_stride, length, num_tiles,
    HAS_BIAS: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    ABREAST: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Grid (PROGRAMS): every program takes each PROGRAMS-th tile. ABREAST runs of tokens share the weight's rows in the L2 cache."""
    for tile in range(tl.program_id(0), num_tiles, PROGRAMS):
        token, row = place_tile(tile, num_tokens, n, BLOCK_N, BLOCK_T, ABREAST)
        has_N, has_T = row < n, token < num_tokens
        token_T, row_N = token.to(tl.int64) * x_stride, row.to(tl.int64) * weight_stride
        if PARTS == 1:
            y = weight_dot(x, weight, token_T, has_T, row_N, has_N, 0, k, EVEN, BLOCK_N, BLOCK_T, BLOCK_K)
        else:
            y = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            for part in range(PARTS):
                first = part * length
                last = tl.minimum(first + length, k)
                y += weight_dot(x, weight, token_T, has_T, row_N, has_N, first, last, EVEN, BLOCK_N, BLOCK_T, BLOCK_K)
        if HAS_BIAS:
            y += tl.load(bias + row, mask=has_N, other=0.0).to(tl.float32)[:, None]
        place = token.to(tl.int64)[None, :] * n + row[:, None]
        tl.store(out + place, y.to(out.dtype.element_ty), mask=has_N[:, None] & has_T[None, :])


@triton.jit
def prefill_tma_kernel(
    x, weight, bias, out, num_tokens, n, k, x_stride, weight_stride, length, num_tiles,
    HAS_BIAS: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    ABREAST: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """`prefill_kernel` with descriptors in place of addresses: the same tiles go through the same instructions in the same order.

    What lies outside a matrix is loaded as 0. Each program makes its two descriptors in memory that Triton asks the launch for.
    """
    weights = tl.make_tensor_descriptor(weight, [n, k], [weight_stride, 1], [BLOCK_N, BLOCK_K])
    tokens = tl.make_tensor_descriptor(x, [num_tokens, k], [x_stride, 1], [BLOCK_T, BLOCK_K])
    for tile in range(tl.program_id(0), num_tiles, PROGRAMS):
        first_T, first_N = tile_corner(tile, num_tokens, n, BLOCK_N, BLOCK_T, ABREAST)
        y = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for part in range(PARTS):
            total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            first = part * length
            for start in range(first, tl.minimum(first + length, k), BLOCK_K):
                total = tl.dot(weights.load([first_N, start]), tokens.load([first_T, start]).T, total, input_precision="ieee")
            if PARTS == 1:
                y = total
            else:
                y += total
        token, row = first_T + tl.arange(0, BLOCK_T), first_N + tl.arange(0, BLOCK_N)
        has_N, has_T = row < n, token < num_tokens
        if HAS_BIAS:
            y += tl.load(bias + row, mask=has_N, other=0.0).to(tl.float32)[:, None]
        place = token.to(tl.int64)[None, :] * n + row[:, None]
        tl.store(out + place, y.to(out.dtype.element_ty), mask=has_N[:, None] & has_T[None, :])


def plain_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, launch: Launcher = run, device: Device = H200, tile: Tile | None = None
) -> Tensor:
    """`plain_linear_reference` on a GPU. tile: another than `tile_for`'s, of the same block_k, which with the parts decides the bits."""
    rows, (n, k) = as_rows(x), weight.shape
    num_tokens = rows.shape[0]
    out = x.new_empty((*x.shape[:-1], n))
    tile = tile or tile_for(num_tokens, x.dtype)
    length = split_length(n, k, tile.block_k, device)
    parts = cdiv(k, length)
    bias_or_any = weight if bias is None else bias
    args: dict[str, Any] = {
        "x": rows, "weight": weight, "bias": bias_or_any, "out": out, "num_tokens": num_tokens, "n": n, "k": k,
        "x_stride": rows.stride(0), "weight_stride": weight.stride(0), "length": length,
    }  # fmt: skip
    constants = {
        "HAS_BIAS": bias is not None, "EVEN": k % tile.block_k == 0, "BLOCK_N": tile.block_n, "BLOCK_T": tile.block_t,
        "BLOCK_K": tile.block_k,
    }  # fmt: skip
    tma = num_tokens > DECODE_ROWS and tile.tma and all(_for_tma(operand) for operand in (rows, weight))
    if tma:
        del constants["EVEN"]
    prefill = prefill_tma_kernel if tma else prefill_kernel
    return launch_product(decode_kernel, prefill, args, constants, out, bias, parts, tile, launch=launch, device=device, scratch=tma)


def launch_product(
    decode: Any, prefill: Any, args: dict[str, Any], constants: dict[str, Any], out: Tensor, bias: Tensor | None, parts: int, tile: Tile,
    *, launch: Launcher, device: Device, scratch: bool = False,
) -> Tensor:  # fmt: skip
    """The launches of a product, also of quantised weights: one by persistent programs for many rows, for few one or two.

    Args:
        decode, prefill: kernels that take `args` and `constants`; prefill also num_tiles, PARTS, ABREAST and PROGRAMS.
        args: out, num_tokens and n among them.
        out: the result, [..., n].
        parts: of K.
        scratch: as `Launch.scratch`, of the prefill kernel.
    """
    num_tokens, n = args["num_tokens"], args["n"]
    runs_n, runs_t = cdiv(n, tile.block_n), cdiv(num_tokens, tile.block_t)
    shape: dict[str, Any] = {"num_warps": tile.num_warps, "num_stages": stages_of(tile, out.itemsize, device)}
    if num_tokens > DECODE_ROWS:
        programs = min(device.num_sms, runs_n * runs_t)
        whole = {**constants, "PARTS": parts, "ABREAST": 8, "PROGRAMS": programs}
        tiles = {**args, "num_tiles": runs_n * runs_t}
        launch(Launch(kernel=prefill, grid=(programs, 1, 1), args=tiles, constants=whole, scratch=scratch, **shape))
        return out
    partial = out if parts == 1 else out.new_empty((parts, num_tokens, n), dtype=torch.float32)
    summed_later = {**constants, "HAS_BIAS": bias is not None and parts == 1}
    launch(Launch(kernel=decode, grid=(runs_n, runs_t, parts), args={**args, "out": partial}, constants=summed_later, **shape))
    if parts > 1:
        launch(add_parts(partial, bias, out, num_tokens, n, parts))
    return out


def _for_tma(matrix: Tensor) -> bool:
    """Whether a descriptor can be made: CUDA's driver API, cuTensorMapEncodeTiled, wants addresses and strides of 16 bytes' multiples."""
    start, stride = matrix.storage_offset() * matrix.itemsize, matrix.stride(0) * matrix.itemsize
    return start % 16 == 0 and stride % 16 == 0


def add_parts(partial: Tensor, bias: Tensor | None, out: Tensor, num_tokens: int, n: int, parts: int) -> Launch:
    """Sum `partial` [parts, num_tokens, n] fp32 into `out`."""
    block = min(1024, next_power_of_2(n))
    return Launch(
        kernel=add_kernel,
        grid=(num_tokens, cdiv(n, block), 1),
        args={"partial": partial, "bias": partial if bias is None else bias, "out": out, "num_tokens": num_tokens, "n": n},
        constants={"PARTS": parts, "HAS_BIAS": bias is not None, "BLOCK": block},
    )


def plain_linear_reason(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why this kernel does not take the arguments, or None."""
    if 0 in weight.shape:
        return f"an empty weight {list(weight.shape)}"
    if weight.stride(1) != 1 or (bias is not None and bias.stride(0) != 1):
        return "weight and bias must be contiguous along their last dimension"
    return dtype_reason(FLOATS, x=x, weight=weight, bias=bias) or row_reason(x=x)


IMPLEMENTATIONS = (Implementation(op="plain_linear", name="triton", supports=plain_linear_reason, call=plain_linear),)
