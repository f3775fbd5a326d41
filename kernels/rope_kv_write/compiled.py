"""Call the compiled kernel on torch tensors through its C entry point; same arguments as the op."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmc.errors import InternalError

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # llmc_types.h
_KV_DTYPES = {**_DTYPES, torch.int8: 3, torch.uint8: 4}
_POINTERS = ("q", "k", "v", "positions", "cos", "sin", "q_weight", "k_weight", "k_cache", "v_cache", "slot_mapping", "out")
_SIZES = ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "rotated", "num_positions", "num_blocks", "block_size")
_STRIDES = ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head", "cos", "sin")
_CACHE_STRIDES = ("k_cache_block", "k_cache_head", "v_cache_block", "v_cache_head")


class RopeKVWriteArgs(ctypes.Structure):
    """LlmcRopeKVWriteArgs of cpu/rope_kv_write.h, field by field."""

    owners: tuple[Tensor | None, ...]  # what the pointers point into

    _fields_: ClassVar[Any] = [
        ("struct_bytes", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in _POINTERS],
        *[(name, ctypes.c_int64) for name in _SIZES],
        *[(f"{name}_stride", ctypes.c_int64) for name in (*_STRIDES, *_CACHE_STRIDES)],
        *[("eps", ctypes.c_double), ("offset", ctypes.c_double)],
        *[(name, ctypes.c_int32) for name in ("round_first", "dtype", "kv_dtype", "table_dtype", "q_weight_dtype", "k_weight_dtype")],
        *[("num_threads", ctypes.c_int32), ("unused", ctypes.c_int32)],
    ]


class CompiledRopeKVWrite:
    """The kernel of one built `kernels` shared object as a Python callable."""

    def __init__(self, kernels_so: Path, num_threads: int = 0) -> None:
        library = ctypes.CDLL(str(kernels_so))
        self._run = library.llmc_rope_kv_write
        self._run.argtypes, self._run.restype = [ctypes.POINTER(RopeKVWriteArgs)], ctypes.c_int32
        self._message = library.llmc_rope_kv_write_message
        self._message.argtypes, self._message.restype = [ctypes.c_int32], ctypes.c_char_p
        self.num_threads = num_threads  # 0: what OpenMP would use

    def __call__(self, *arguments: Any) -> Tensor:
        """As `rope_kv_write_reference`, but for the order inside a cache block, which is paged attention's own.

        Raises:
            InternalError: the kernel refused the arguments; the message says why. Nothing was written.
        """
        args = self.arguments(*arguments)
        self.run(args)
        out = args.owners[-1]
        assert out is not None
        return out

    def run(self, args: RopeKVWriteArgs) -> None:
        """Run prepared arguments (`arguments`); benchmarks call this alone, so that Python's share stays out of the time."""
        status = self._run(ctypes.byref(args))
        if status != 0:
            raise InternalError(self._message(status).decode())

    def arguments(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        offset: float,
        round_first: bool,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        group: int,
    ) -> RopeKVWriteArgs:
        """Fill the C struct. It keeps the tensors alive; the last of `owners` is the result."""
        slots, out = slot_mapping[group], torch.empty(q.shape, dtype=q.dtype)
        tensors = {
            "q": q, "k": k, "v": v, "positions": positions, "cos": cos, "sin": sin, "q_weight": q_weight, "k_weight": k_weight,
            "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slots, "out": out,
        }  # fmt: skip
        for name, tensor in tensors.items():
            if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                raise InternalError(f"rope_kv_write: {name} has stride {tensor.stride(-1)} in its last dimension, expected 1")
        rows = {"q": q, "k": k, "v": v}
        args = RopeKVWriteArgs(
            struct_bytes=ctypes.sizeof(RopeKVWriteArgs),
            num_tokens=q.shape[0], num_heads=q.shape[1], num_kv_heads=k.shape[1], head_dim=q.shape[2], rotated=cos.shape[1],
            num_positions=cos.shape[0], num_blocks=k_cache.shape[0], block_size=k_cache.shape[2],
            cos_stride=cos.stride(0), sin_stride=sin.stride(0), eps=eps, offset=offset, round_first=round_first,
            dtype=_DTYPES[q.dtype], kv_dtype=_KV_DTYPES[k_cache.dtype], table_dtype=_DTYPES[cos.dtype],
            q_weight_dtype=0 if q_weight is None else _DTYPES[q_weight.dtype],
            k_weight_dtype=0 if k_weight is None else _DTYPES[k_weight.dtype], num_threads=self.num_threads,
            **{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
            **{f"{name}_{which}_stride": rows[name].stride(i) for name in rows for i, which in enumerate(("token", "head"))},
            **{f"k_cache_{which}_stride": k_cache.stride(i) for i, which in enumerate(("block", "head"))},
            **{f"v_cache_{which}_stride": v_cache.stride(i) for i, which in enumerate(("block", "head"))},
        )  # fmt: skip
        args.owners = tuple(tensors.values())
        return args
