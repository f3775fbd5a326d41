"""float8_e4m3fn in numpy, which carries it as bytes.

The format is that of "FP8 Formats for Deep Learning" (Micikevicius and others, 2022): a sign, 4 bits of exponent plus 7, 3 of mantissa,
no infinity, and NaN where all seven are set.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from llmc.artifacts.dtypes import Array

NAME = "float8_e4m3fn"
TOP = 448.0  # the largest number

Wide = npt.NDArray[np.float32]


def decode(codes: Array) -> Wide:
    """uint8, any shape -> float32."""
    wide: Wide = _values()[codes]
    return wide


def encode(values: Wide) -> npt.NDArray[np.uint8]:
    """float32, any shape, finite -> the nearest numbers' bytes, ties to even; magnitudes past 448 become 448."""
    size = np.minimum(np.abs(values), np.float32(TOP))
    bits = size.view(np.int32)
    # fp32 holds 3 bits of mantissa in its upper 12, and adds 127 to an exponent where fp8 adds 7
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = np.rint(size * np.float32(512))  # of 2^-9; 8 is the smallest normal number
    codes: npt.NDArray[np.uint8] = np.where(size < np.float32(2**-6), subnormal, normal).astype(np.uint8)
    codes |= np.signbit(values).astype(np.uint8) << np.uint8(7)
    return codes


@cache
def _values() -> Wide:
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).astype(np.float64)
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    size[codes & 127 == 127] = np.nan
    return np.where(codes & 128, -size, size).astype(np.float32)
