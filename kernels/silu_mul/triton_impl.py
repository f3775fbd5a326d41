"""llmc::silu_mul in Triton: pointwise, one program per row and run of columns."""

# The parameters of kernels have types that only Triton knows.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import FLOATS, H200, Device, Launch, Launcher, as_rows, cdiv, dtype_reason, next_power_of_2, row_reason, run
from ..registry import Implementation

MAX_BLOCK = 1024


@triton.jit
def silu_mul_kernel(gate, up, out, gate_stride, up_stride, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    y = g / (1.0 + tl.exp(-g)) * u
    tl.store(out + row * n + columns, y.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate: Tensor, up: Tensor, *, launch: Launcher = run, device: Device = H200) -> Tensor:
    """`silu_mul_reference` on a GPU."""
    out = gate.new_empty(gate.shape)
    launch(gated_launch(silu_mul_kernel, gate, up, out, {}))
    return out


def gated_launch(kernel: object, gate: Tensor, up: Tensor, out: Tensor, constants: dict[str, bool]) -> Launch:
    """The launch of a kernel that reads gate and up and writes as much."""
    gates, ups, n = as_rows(gate), as_rows(up), gate.shape[-1]
    block = min(MAX_BLOCK, next_power_of_2(n))
    return Launch(
        kernel=kernel,
        grid=(gates.shape[0], cdiv(n, block), 1),
        args={"gate": gates, "up": ups, "out": out, "gate_stride": gates.stride(0), "up_stride": ups.stride(0), "n": n},
        constants={**constants, "BLOCK": block},
    )


def gated_reason(gate: Tensor, up: Tensor) -> str | None:
    """Why a gated kernel does not take the arguments, or None."""
    if gate.shape[-1] == 0:
        return "rows without columns"
    return dtype_reason(FLOATS, gate=gate, up=up) or row_reason(gate=gate, up=up)


IMPLEMENTATIONS = (Implementation(op="silu_mul", name="triton", supports=gated_reason, call=silu_mul),)
