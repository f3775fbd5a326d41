"""The C interface of the kernels image, mirrored for ctypes. Only the `nodes` executor calls kernels itself.

Mirrors kernels/paged_attention/cpu/paged_attention.h and kernels/lora_add/cpu/lora_add.h; the struct's size tells the kernel which
version of it this is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, ClassVar

from llmc.errors import ArtifactError, InternalError

KERNEL_DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "uint8": 4}  # the last two: of KV caches, uint8 being fp8 e4m3

_SIZES = ("window", "num_tokens", "num_seqs", "num_heads", "num_kv_heads", "head_dim", "num_blocks", "block_size", "max_blocks")
_INPUTS = ("q", "k", "v", "k_cache", "v_cache", "slot_mapping", "block_tables", "seq_lens", "query_start_loc", "sinks")
_STRIDED = ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head")
_CACHE_STRIDED = ("k_cache_block", "k_cache_head", "v_cache_block", "v_cache_head", "block_table")


class PagedAttentionArgs(ctypes.Structure):
    """llmc_paged_attention_args. Strides count elements; pointers are addresses the caller keeps alive."""

    _fields_: ClassVar = [
        ("struct_size", ctypes.c_uint32),
        ("num_threads", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("kv_dtype", ctypes.c_int32),
        ("sinks_dtype", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("reserved", ctypes.c_int32),
        *[(name, ctypes.c_int64) for name in _SIZES],
        *[(name, ctypes.c_void_p) for name in (*_INPUTS, "out")],
        *[(f"{name}_stride", ctypes.c_int64) for name in (*_STRIDED, *_CACHE_STRIDED)],
    ]


class LoraAddArgs(ctypes.Structure):
    """LlmcLoraAddArgs. Strides count elements; pointers are addresses the caller keeps alive."""

    _fields_: ClassVar = [
        ("struct_bytes", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("y", "x", "slots", "pool", "out", "sizes", "offsets")],
        *[(name, ctypes.c_int64) for name in ("m", "n", "k", "y_stride", "x_stride", "num_slots", "slot_elements", "num_parts", "rank")],
        *[(name, ctypes.c_int32) for name in ("dtype", "pool_dtype", "num_threads", "unused")],
    ]


def bind_lora_add(kernels: ctypes.CDLL) -> Callable[[LoraAddArgs], None]:
    """The kernel as a function that fills `out`, or raises.

    Raises:
        ArtifactError: the image has no such kernel.
    """
    function = _function(kernels, "llmc_lora_add", ctypes.POINTER(LoraAddArgs), ctypes.c_int32)

    def call(args: LoraAddArgs) -> None:
        args.struct_bytes = ctypes.sizeof(LoraAddArgs)
        status = function(ctypes.byref(args))
        if status:
            raise InternalError(f"lora_add refused its arguments (status {status}); please report this")

    return call


def bind_paged_attention(kernels: ctypes.CDLL) -> Callable[[PagedAttentionArgs], None]:
    """The kernel as a function that fills `out` and the caches, or raises.

    Raises:
        ArtifactError: the image has no such kernel.
    """
    function = _function(kernels, "llmc_paged_attention", ctypes.POINTER(PagedAttentionArgs), ctypes.c_int32)
    message = _function(kernels, "llmc_paged_attention_message", ctypes.c_int32, ctypes.c_char_p)

    def call(args: PagedAttentionArgs) -> None:
        args.struct_size = ctypes.sizeof(PagedAttentionArgs)
        status = function(ctypes.byref(args))
        if status:
            raise InternalError(f"paged attention failed: {(message(status) or b'').decode(errors='replace')} (status {status})")

    return call


def _function(kernels: ctypes.CDLL, name: str, argument: Any, result: Any) -> Any:  # ctypes types, a ctypes function
    try:
        function = getattr(kernels, name)
    except AttributeError as error:
        raise ArtifactError(f"the kernels image has no {name}; compile the artifact again") from error
    function.argtypes, function.restype = [argument], result
    return function
