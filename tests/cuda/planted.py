"""A kernel that goes astray: llmc's RMSNorm, but for where it stores. Compiled into an artifact in its place."""

# The parameters of kernels have types that only Triton knows.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def astray_kernel(
    x, residual, weight, out, summed, x_stride, residual_stride, n, eps, offset,
    HAS_RESIDUAL: tl.constexpr, ROUND_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`rms_norm_kernel` that stores 2**44 elements past its results, where no memory is."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(summed + row * n + columns, value.to(summed.dtype.element_ty), mask=inside)
    scale = tl.rsqrt(tl.sum(value * value, 0) / n + tl.cast(eps, tl.float32))
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + tl.cast(offset, tl.float32)
    far = (row + 1) << 44
    tl.store(out + far + row * n + columns, (value * scale * factor).to(out.dtype.element_ty), mask=inside)
