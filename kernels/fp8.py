"""float8_e4m3fn in Triton kernels by integer arithmetic: any GPU, and Triton's interpreter, gives the same bits.

A number's bits, moved to where fp32 keeps sign, exponent and mantissa, are that number times 2^-120: the exponents' biases differ by
so much, and what is subnormal in one is subnormal in the other.
"""

# The parameters of kernels have types that only Triton knows.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_UP = tl.constexpr(2.0**120)
_DOWN = tl.constexpr(2.0**-120)


def as_bytes(x: Tensor) -> Tensor:
    """A float8_e4m3fn tensor as uint8, for `from_fp8` and `to_fp8`; any other as it is."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


@triton.jit
def from_fp8(bits):
    """uint8 -> fp32. The two NaN codes read as 480 and -480, which no number is."""
    wide = bits.to(tl.int32)
    return (((wide & 0x80) << 24) | ((wide & 0x7F) << 20)).to(tl.float32, bitcast=True) * _UP


@triton.jit
def to_fp8(x):
    """fp32 -> uint8, to nearest even; magnitudes past 448 become 448, a NaN a NaN code."""
    bits = (tl.minimum(tl.abs(x), 448.0) * _DOWN).to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(x == x, rounded, 0x7F) | sign).to(tl.uint8)


@triton.jit
def cache_value(x, cache):
    """x as the cache behind the pointer `cache` holds it: fp8 where that is bytes, else unchanged."""
    if cache.dtype.element_ty == tl.uint8:
        x = to_fp8(x.to(tl.float32))
    return x


@triton.jit
def load_cache(at, mask, dtype: tl.constexpr):
    """What a cache holds as `dtype`, 0 where the mask is off."""
    if at.dtype.element_ty == tl.uint8:
        x = from_fp8(tl.load(at, mask=mask, other=0)).to(dtype)
    else:
        x = tl.load(at, mask=mask, other=0.0)
    return x
