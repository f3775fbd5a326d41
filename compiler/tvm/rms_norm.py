"""llmc.rms_norm as one tensor expression, which TVM compiles to one function.

The squares of a row are summed in as many lanes as a vector register holds, then over the lanes: LLVM may not reorder a sum of floats,
so a sum written in one lane would stay scalar. Lanes and order depend on the row's length alone.
"""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx

_LANES = 16  # fp32 values of a 512-bit register


def rms_norm(builder: relax.BlockBuilder, x: Any, weight: Any, eps: float, offset: float, round_first: bool) -> relax.Var:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension, in fp32, rounded to x's dtype."""
    return builder.emit_te(_rms_norm, x, weight, eps, offset, round_first, primfunc_name_hint="rms_norm")


def _rms_norm(x: te.Tensor, weight: te.Tensor, eps: float, offset: float, round_first: bool) -> te.Tensor:
    rows, length, dtype = x.shape[:-1], int(x.shape[-1]), x.dtype
    lanes = _LANES if length % _LANES == 0 else 1
    step, lane = te.reduce_axis((0, length // lanes), "step"), te.reduce_axis((0, lanes), "lane")

    def wide(*index: Any) -> Any:
        return x(*index).astype("float32")

    def partial(*index: Any) -> Any:
        *row, place = index
        value = wide(*row, step * lanes + place)
        return te.sum(value * value, axis=step)

    partial_sums = te.compute((*rows, lanes), partial, name="partial_sums")
    squares = te.compute(rows, lambda *row: te.sum(partial_sums(*row, lane), axis=lane), name="squares")
    inverse = te.compute(
        rows, lambda *row: tirx.rsqrt(squares(*row) / tirx.const(length, "float32") + tirx.const(eps, "float32")), "inverse"
    )

    def result(*index: Any) -> Any:
        *row, column = index
        value = wide(*index) * inverse(*row)
        if round_first:
            value = value.astype(dtype).astype("float32")
        factor = weight(column).astype("float32")
        return (value * (factor if offset == 0.0 else factor + tirx.const(offset, "float32"))).astype(dtype)

    return te.compute(x.shape, result, name="rms_norm")
