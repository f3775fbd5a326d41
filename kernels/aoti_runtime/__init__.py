"""Tensors and vector functions for a model image where there is no torch: the C functions of AOTInductor's interface that the code of a
compiled model calls, and no others. Image of role "tensor_runtime"; see tensor.cpp, topk.cpp and vector_math.cpp."""

from __future__ import annotations

from collections.abc import Iterable

SONAME = "libllmc_tensor_runtime.so.1"  # model images ask for it by this name; the number changes with the meaning of a function

# What it provides; tests compare this with the built image. Sleef_*f16_* are there where the target has AVX-512.
PROVIDED = frozenset(
    {f"aoti_torch_{name}" for name in (
        "empty_strided", "create_tensor_from_blob", "create_tensor_from_blob_v2", "new_tensor_handle", "_reinterpret_tensor", "clone",
        "delete_tensor_object", "get_data_ptr", "get_dim", "get_numel", "get_sizes", "get_strides", "get_dtype", "get_device_type",
        "get_storage_offset", "get_storage_size", "is_contiguous", "device_type_cpu", "device_type_cuda", "layout_strided",
        "grad_mode_is_enabled", "grad_mode_set_enabled", "check", "cpu_topk",
    )}
    | {f"aoti_torch_dtype_{name}" for name in (
        "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "bool", "bfloat16",
    )}
    | {f"Sleef_{name}f{lanes}_u10" for name in ("exp", "tanh") for lanes in (8, 16)}
)  # fmt: skip
SHIM_PREFIX = "aoti_torch_cpu_llmc_"  # our ops, which the image has besides


def lacking(symbols: Iterable[str]) -> list[str]:
    """Those of a model image's undefined symbols that only libtorch has, sorted."""
    return sorted(name for name in symbols if name not in PROVIDED and not name.startswith(SHIM_PREFIX))
