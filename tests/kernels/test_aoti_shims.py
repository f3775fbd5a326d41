"""The aoti_torch_cpu_llmc_* functions: same answers as the references, and failure instead of harm on a wrong argument."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmc.kernels import ops  # noqa: F401  (registers the ops)
from llmc.kernels.build import build_kernels, dlopen_order
from llmc.kernels.isa import runnable_levels

from .matmul_world import DTYPES, assert_close, packed, random
from .paged_attention_world import kernel_cache
from .test_quantized_linear import quantized

_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.argtypes, _pointer_of.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
_capsule_of = ctypes.pythonapi.PyCapsule_New
_capsule_of.argtypes, _capsule_of.restype = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p], ctypes.py_object
Shim = Callable[..., Tensor | None]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    """shim(op, tensors, bias, integers): the op through its shim; None where the shim reports failure. bias False: the op has none."""
    built = build_kernels(runnable_levels()[0].name, kernel_cache(tmp_path_factory))
    order = dlopen_order(built, Path(torch.__file__).parent / "lib")
    library = [ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_GLOBAL) for path in order][-1]

    def call(op: str, tensors: list[Tensor], bias: Tensor | bool | None, *integers: int) -> Tensor | None:
        given = [*tensors, *([bias] if isinstance(bias, Tensor) else [])]
        capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(given)
        handles = [ctypes.c_void_p(_pointer_of(capsule, None)) for capsule in capsules]
        arguments: list[object] = handles[: len(tensors)]
        if bias is not False:
            arguments.append(ctypes.byref(handles[-1]) if isinstance(bias, Tensor) else None)
        result = ctypes.c_void_p()
        status = getattr(library, f"aoti_torch_cpu_llmc_{op}")(*arguments, *map(ctypes.c_int64, integers), ctypes.byref(result))
        for capsule in capsules:
            torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(capsule)  # frees the handle
        if status != 0:
            assert result.value is None
            return None
        return torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(_capsule_of(result, None, None))

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(shim: Shim, dtype: torch.dtype) -> None:
    w, bias, wide = random(37, 45, dtype=dtype), random(37, dtype=dtype, seed=1), random(3, 4, 60, dtype=dtype, seed=2)
    for x in (wide[..., :45], wide[0, :, 2:47], wide[1, 2, :45].contiguous(), wide[:, :1, :45], wide[:0, :, :45]):
        for b in (None, bias):
            y = shim("linear", [x, packed(w)], b, 37)
            assert y is not None and y.dtype == dtype and y.is_contiguous() and y.shape == (*x.shape[:-1], 37)
            assert_close(y, torch.ops.llmc.linear(x, packed(w), b, 37).double(), 45)


def test_linear_refuses(shim: Shim) -> None:
    x, w = random(6, 45, dtype=torch.float32), random(37, 45, dtype=torch.float32)
    good = packed(w)
    assert shim("linear", [x, good], None, 37) is not None
    assert shim("linear", [x, good], None, 49) is None, "another number of columns"
    assert shim("linear", [x, good], None, 0) is None
    assert shim("linear", [x[:, :44], good], None, 37) is None, "another K"
    assert shim("linear", [x.half(), good], None, 37) is None, "two dtypes"
    assert shim("linear", [x.double(), good.double()], None, 37) is None, "a dtype without kernel"
    assert shim("linear", [x, w], None, 37) is None, "a plain weight"
    assert shim("linear", [x.t().contiguous().t(), good], None, 37) is None, "columns apart"
    assert shim("linear", [x, good], torch.zeros(36), 37) is None, "a short bias"
    assert shim("linear", [x, good], torch.zeros(37).half(), 37) is None
    assert shim("linear", [torch.zeros(2, 3, 90)[:, :2, :45], good], None, 37) is None, "rows that do not collapse"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding(shim: Shim, dtype: torch.dtype) -> None:
    w = random(37, 45, dtype=dtype)
    ids = torch.tensor([[0, 36], [5, 5]])
    y = shim("embedding", [ids, packed(w)], False, 45)
    assert y is not None and torch.equal(y, w[ids])
    assert shim("embedding", [ids.int(), packed(w)], False, 45) is None
    assert shim("embedding", [ids, packed(w)], False, 77) is None
    assert shim("embedding", [ids + 1000, packed(w)], False, 45) is None, "ids outside"
    assert shim("embedding", [ids.t(), packed(w)], False, 45) is None, "ids apart"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_linear(shim: Shim, dtype: torch.dtype) -> None:
    w, bias, x = random(3, 20, 45, dtype=dtype), random(3, 20, dtype=dtype, seed=1), random(7, 50, dtype=dtype, seed=2)[:, :45]
    ids = torch.tensor([2, 0, 2, 2, 1, 0, 0])
    for b in (None, bias):
        y = shim("grouped_linear", [x, packed(w), ids], b, 20)
        assert y is not None
        assert_close(y, torch.ops.llmc.grouped_linear(x, packed(w), ids, b, 20).double(), 45)
    assert shim("grouped_linear", [x, packed(w), ids + 1], None, 20) is None, "an unknown expert"
    assert shim("grouped_linear", [x, packed(w), ids[:6]], None, 20) is None
    assert shim("grouped_linear", [x, packed(w[0]), ids], None, 20) is None
    assert shim("grouped_linear", [x, packed(w), ids], bias[:2], 20) is None


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantized_linear(shim: Shim, dtype: torch.dtype, bits: int) -> None:
    weight, scales = quantized(random(37, 45, dtype=dtype), bits)
    bias, wide = random(37, dtype=dtype, seed=1), random(3, 4, 60, dtype=dtype, seed=2)
    for x in (wide[..., :45], wide[1, 2, :45].contiguous(), wide[:0, :, :45]):
        for b in (None, bias):
            y = shim("quantized_linear", [x, weight, scales], b, 37, 32)
            assert y is not None and y.dtype == dtype and y.is_contiguous() and y.shape == (*x.shape[:-1], 37)
            assert_close(y, torch.ops.llmc.quantized_linear(x, weight, scales, b, 37, 32).double(), 45)


def test_quantized_linear_refuses(shim: Shim) -> None:
    x = random(6, 45, dtype=torch.float32)
    weight, scales = quantized(random(37, 45, dtype=torch.float32), 8)
    good = [x, weight, scales]
    assert shim("quantized_linear", good, None, 37, 32) is not None
    assert shim("quantized_linear", good, None, 49, 32) is None, "another number of columns"
    assert shim("quantized_linear", good, None, 37, 48) is None, "a group that is no multiple of 32"
    assert shim("quantized_linear", good, None, 37, 64) is None, "another group"
    assert shim("quantized_linear", good, None, 37, 0) is None
    assert shim("quantized_linear", [x, weight, scales.half()], None, 37, 32) is None, "two dtypes"
    assert shim("quantized_linear", [x, weight.float(), scales], None, 37, 32) is None, "no integers"
    assert shim("quantized_linear", [x, weight.view(torch.uint8), scales], None, 37, 32) is None, "8 bits said to be 4"
    assert shim("quantized_linear", [x[:, :31], weight, scales], None, 37, 32) is None, "another K"
    assert shim("quantized_linear", good, torch.zeros(36), 37, 32) is None, "a short bias"


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_embedding(shim: Shim, bits: int) -> None:
    weight, scales = quantized(random(37, 45, dtype=torch.bfloat16), bits)
    ids = torch.tensor([[0, 36], [5, 5]])
    y = shim("quantized_embedding", [ids, weight, scales], False, 45, 32)
    assert y is not None and torch.equal(y, torch.ops.llmc.quantized_embedding(ids, weight, scales, 45, 32))
    assert shim("quantized_embedding", [ids.int(), weight, scales], False, 45, 32) is None
    assert shim("quantized_embedding", [ids, weight, scales], False, 77, 32) is None
    assert shim("quantized_embedding", [ids + 1000, weight, scales], False, 45, 32) is None, "ids outside"
    assert shim("quantized_embedding", [ids.t(), weight, scales], False, 45, 32) is None, "ids apart"
