"""Conversions between the float types. They round once, to nearest even."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llmc.artifacts.dtypes import Array


def cast(values: Array, source: str, target: str) -> Array:
    """Convert between float32, float16 and bfloat16. Overflow gives infinity, NaN stays NaN with its sign.

    Args:
        values: any shape, dtype `NUMPY[source]`.
        source, target: names out of `FLOATS`; equal names give `values` itself.
    """
    if source == target:
        return values
    wide = _bf16_to_f32(values) if source == "bfloat16" else values.astype(np.float32)
    if target == "float32":
        return wide
    if target == "bfloat16":
        return _f32_to_bf16(wide)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return wide.astype(np.float16)


def _bf16_to_f32(bits: Array) -> npt.NDArray[np.float32]:
    wide: npt.NDArray[np.uint32] = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def _f32_to_bf16(values: Array) -> npt.NDArray[np.uint16]:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # wraps only where the value is NaN
    result: npt.NDArray[np.uint16] = (rounded >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        # Rounding could carry a NaN's fraction away and leave infinity: set the quiet bit instead.
        result[nan] = ((bits[nan] >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16)
    return result
