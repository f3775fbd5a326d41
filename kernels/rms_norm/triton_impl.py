"""llmc::rms_norm and llmc::add_rms_norm in Triton: one program per row, one pass over it.

A row's sum of squares has one order, fixed by n alone, so that its bits do not depend on the rows beside it.
"""

# The parameters of kernels have types that only Triton knows.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import FLOATS, H200, Device, Launch, Launcher, as_rows, dtype_reason, next_power_of_2, row_reason, run
from ..registry import Implementation

MAX_COLUMNS = 16384  # one row in the registers of one block


@triton.jit
def rms_norm_kernel(
    x, residual, weight, out, summed, x_stride, residual_stride, n, eps, offset,
    HAS_RESIDUAL: tl.constexpr, ROUND_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(summed.dtype.element_ty)
        tl.store(summed + row * n + columns, rounded, mask=inside)
        value = rounded.to(tl.float32)
    # eps and offset arrive as fp64 from some callers: widening the whole row for them would be slow and change its bits
    scale = tl.rsqrt(tl.sum(value * value, 0) / n + tl.cast(eps, tl.float32))
    value = value * scale
    if ROUND_FIRST:
        value = value.to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + tl.cast(offset, tl.float32)
    tl.store(out + row * n + columns, (value * factor).to(out.dtype.element_ty), mask=inside)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool, *, launch: Launcher = run, device: Device = H200
) -> Tensor:
    """`rms_norm_reference` on a GPU."""
    out = x.new_empty(x.shape)
    launch(_launch(x, x, weight, out, out, eps, offset, round_first, has_residual=False))
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool, *,
    launch: Launcher = run, device: Device = H200,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`add_rms_norm_reference` on a GPU."""
    out, summed = x.new_empty(x.shape), x.new_empty(x.shape)
    launch(_launch(x, residual, weight, out, summed, eps, offset, round_first, has_residual=True))
    return out, summed


def _launch(
    x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, summed: Tensor, eps: float, offset: float, round_first: bool, *,
    has_residual: bool,
) -> Launch:  # fmt: skip
    rows, residual_rows, n = as_rows(x), as_rows(residual), x.shape[-1]
    block = next_power_of_2(n)
    return Launch(
        kernel=rms_norm_kernel,
        grid=(rows.shape[0], 1, 1),
        args={
            "x": rows, "residual": residual_rows, "weight": weight, "out": out, "summed": summed, "x_stride": rows.stride(0),
            "residual_stride": residual_rows.stride(0), "n": n, "eps": eps, "offset": offset,
        },
        constants={"HAS_RESIDUAL": has_residual, "ROUND_FIRST": round_first, "BLOCK": block},
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip


def rms_norm_reason(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> str | None:
    """Why this kernel does not take the arguments, or None."""
    if not 0 < x.shape[-1] <= MAX_COLUMNS:
        return f"rows of {x.shape[-1]} columns; it takes 1 to {MAX_COLUMNS}"
    if weight.dtype not in FLOATS or weight.stride(0) != 1:
        return f"the weight must be contiguous and floating, it is {weight.dtype} with stride {weight.stride(0)}"
    return dtype_reason(FLOATS, x=x) or row_reason(x=x)


def add_rms_norm_reason(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> str | None:
    """Why this kernel does not take the arguments, or None."""
    return rms_norm_reason(x, weight, eps, offset, round_first) or dtype_reason(FLOATS, x=x, residual=residual) or row_reason(r=residual)


IMPLEMENTATIONS = (
    Implementation(op="rms_norm", name="triton", supports=rms_norm_reason, call=rms_norm),
    Implementation(op="add_rms_norm", name="triton", supports=add_rms_norm_reason, call=add_rms_norm),
)
