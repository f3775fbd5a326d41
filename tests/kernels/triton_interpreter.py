"""Teach Triton's CPU interpreter bf16, and give it dots whose bits do not depend on the tile's size.

The interpreter keeps bf16 as uint16 and (in 3.6 to 3.9) computes on the raw bits. Here arithmetic and dots on bf16 go through fp32
and round to nearest even. A dot is summed along k one product after the other, as a row of a tile on the GPU has one order; numpy's
own matmul takes another order for another number of rows. Import before any kernel runs, in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_BF16 = tl.bfloat16
_Handle = interpreter.TensorHandle
_Builder = interpreter.InterpreterBuilder


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == _BF16)


def _wide(handle: Any) -> Any:
    """bf16 bits as fp32 values; everything else as it is."""
    if _is_bf16(handle) and handle.data.dtype == np.uint16:
        return _Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    return handle


def _rounded(values: Any) -> Any:
    """fp32 values as bf16 bits, to nearest even."""
    shape = np.shape(values)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    narrow = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    narrow[np.isnan(np.ascontiguousarray(values, dtype=np.float32))] = 0x7FC0
    return _Handle(narrow.reshape(shape), _BF16)


def _patch(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(_Builder, name, make(getattr(_Builder, name)))


def _binary_op(original: Callable[..., Any]) -> Callable[..., Any]:
    def patched(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not (_is_bf16(left) or _is_bf16(right)):
            return original(self, left, right, op)
        result = op(_wide(left).data, _wide(right).data)
        return _Handle(result, tl.int1) if result.dtype == bool else _rounded(result)

    return patched


def _unary_op(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, x, op: _rounded(op(_wide(x).data)) if _is_bf16(x) else original(self, x, op)


def _rsqrt(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, x: _rounded(1 / np.sqrt(_wide(x).data)) if _is_bf16(x) else original(self, x)


def _fma(original: Callable[..., Any]) -> Callable[..., Any]:
    def patched(self: Any, x: Any, y: Any, z: Any) -> Any:
        if _is_bf16(z):
            return _rounded(_wide(x).data * _wide(y).data + _wide(z).data)
        return original(self, x, y, z)

    return patched


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def patched(self: Any, source: Any, target: Any) -> Any:
        if _is_bf16(source) and target.scalar != _BF16:
            return _wide(source) if target.scalar == tl.float32 else original(self, _wide(source), target)
        if target.scalar == _BF16 and not _is_bf16(source):
            return _rounded(source.data.astype(np.float32))
        return original(self, source, target)

    return patched


def _dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def patched(self: Any, a: Any, b: Any, accumulator: Any, *rest: Any) -> Any:
        left, right = _wide(a).data, _wide(b).data
        if left.dtype not in (np.float32, np.float16):
            return original(self, a, b, accumulator, *rest)
        left, right = left.astype(np.float32), right.astype(np.float32)
        total = accumulator.data.astype(np.float32)  # a copy
        for k in range(left.shape[-1]):
            total += left[:, k, None] * right[None, k, :]
        return _Handle(total, accumulator.dtype.scalar)

    return patched


def _patch_index() -> None:
    """Loop bounds are arrays of one element, which numpy 2.4 no longer takes for an int."""
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


_patch_index()
_patch("binary_op", _binary_op)
_patch("unary_op", _unary_op)
_patch("create_rsqrt", _rsqrt)
_patch("create_fma", _fma)
_patch("cast_impl", _cast)
_patch("create_dot", _dot)
for _name in ("create_si_to_fp", "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui", "create_fp_ext", "create_fp_trunc"):
    setattr(_Builder, _name, lambda self, source, target: self.cast_impl(source, target))
