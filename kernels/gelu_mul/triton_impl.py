"""llmc::gelu_mul in Triton: pointwise, one program per row and run of columns."""

# The parameters of kernels have types that only Triton knows.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import H200, Device, Launcher, run
from ..registry import Implementation
from ..silu_mul.triton_impl import gated_launch, gated_reason


@triton.jit
def gelu_mul_kernel(gate, up, out, gate_stride, up_stride, n, TANH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if TANH:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        # (1 + tanh(t)) / 2 is the logistic function of 2 t, which needs no tanh and loses nothing near zero
        y = g / (1.0 + tl.exp(-2.0 * inner)) * u
    else:
        y = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476)) * u
    tl.store(out + row * n + columns, y.to(out.dtype.element_ty), mask=inside)


def gelu_mul(gate: Tensor, up: Tensor, tanh: bool, *, launch: Launcher = run, device: Device = H200) -> Tensor:
    """`gelu_mul_reference` on a GPU."""
    out = gate.new_empty(gate.shape)
    launch(gated_launch(gelu_mul_kernel, gate, up, out, {"TANH": tanh}))
    return out


def gelu_mul_reason(gate: Tensor, up: Tensor, tanh: bool) -> str | None:
    """Why this kernel does not take the arguments, or None."""
    return gated_reason(gate, up)


IMPLEMENTATIONS = (Implementation(op="gelu_mul", name="triton", supports=gelu_mul_reason, call=gelu_mul),)
