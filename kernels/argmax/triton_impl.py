"""llmc::argmax in Triton: a row's runs of ids side by side, then the best of the runs. Comparisons only, so no rounding anywhere."""

# The parameters of kernels have types that only Triton knows.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import FLOATS, H200, Device, Launch, Launcher, cdiv, dtype_reason, next_power_of_2, run
from ..registry import Implementation

RUN = 4096  # ids


@triton.jit
def _best(value, index, NONE: tl.constexpr):
    """The largest value and the lowest index that has it."""
    best = tl.max(value, 0)
    return best, tl.min(tl.where(value == best, index, NONE), 0)


@triton.jit
def runs_kernel(logits, values, ids, stride, vocab, BLOCK: tl.constexpr, NONE: tl.constexpr):
    """Grid (row, run)."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row * stride + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
    value = tl.where(value == value, value, float("-inf"))
    best, at = _best(value, index, NONE)  # of equals the lowest, so never an id past the vocabulary
    tl.store(values + row * tl.num_programs(1) + tl.program_id(1), best)
    tl.store(ids + row * tl.num_programs(1) + tl.program_id(1), at)


@triton.jit
def rows_kernel(values, ids, out, num_runs, BLOCK: tl.constexpr, NONE: tl.constexpr):
    """Grid (row): runs lie in the order of their ids."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    value = tl.load(values + row * num_runs + i, mask=i < num_runs, other=float("-inf"))
    index = tl.load(ids + row * num_runs + i, mask=i < num_runs, other=NONE)
    _, at = _best(value, index, NONE)
    tl.store(out + row, at.to(tl.int64))


def argmax(logits: Tensor, *, launch: Launcher = run, device: Device = H200) -> Tensor:
    """`argmax_reference` on a GPU."""
    num_rows, vocab = logits.shape
    block = min(RUN, next_power_of_2(vocab))
    num_runs = cdiv(vocab, block)
    values = logits.new_empty((num_rows, num_runs), dtype=torch.float32)
    ids = logits.new_empty((num_rows, num_runs), dtype=torch.int32)
    out = logits.new_empty((num_rows,), dtype=torch.int64)
    none = 2**31 - 1
    launch(
        Launch(
            kernel=runs_kernel,
            grid=(num_rows, num_runs, 1),
            args={"logits": logits, "values": values, "ids": ids, "stride": logits.stride(0), "vocab": vocab},
            constants={"BLOCK": block, "NONE": none},
            num_warps=4,
        )
    )
    launch(
        Launch(
            kernel=rows_kernel,
            grid=(num_rows, 1, 1),
            args={"values": values, "ids": ids, "out": out, "num_runs": num_runs},
            constants={"BLOCK": next_power_of_2(num_runs), "NONE": none},
            num_warps=1,
        )
    )
    return out


def argmax_reason(logits: Tensor) -> str | None:
    """Why these kernels do not take the logits, or None."""
    if logits.stride(1) != 1:
        return "rows of logits must be contiguous"
    return dtype_reason(FLOATS, logits=logits)


IMPLEMENTATIONS = (Implementation(op="argmax", name="triton", supports=argmax_reason, call=argmax),)
