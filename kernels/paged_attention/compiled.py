"""Call the compiled kernel on torch tensors through its C entry point; same arguments as the op."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from llmc.errors import InternalError

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # llmc_types.h
_KV_DTYPES = {**_DTYPES, torch.int8: 3, torch.uint8: 4}

_INT64_FIELDS = ("window", "num_tokens", "num_seqs", "num_heads", "num_kv_heads", "head_dim", "num_blocks", "block_size", "max_blocks")
_POINTER_FIELDS = ("q", "k", "v", "k_cache", "v_cache", "slot_mapping", "block_tables", "seq_lens", "query_start_loc", "sinks", "out")
_STRIDE_FIELDS = (
    "q_token_stride", "q_head_stride", "k_token_stride", "k_head_stride", "v_token_stride", "v_head_stride",
    "k_cache_block_stride", "k_cache_head_stride", "v_cache_block_stride", "v_cache_head_stride", "block_table_stride",
)  # fmt: skip


class PagedAttentionArgs(ctypes.Structure):
    """llmc_paged_attention_args of cpu/paged_attention.h, field by field."""

    owners: tuple[Tensor | None, ...]  # what the pointers point into

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("num_threads", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("kv_dtype", ctypes.c_int32),
        ("sinks_dtype", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("reserved", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in _INT64_FIELDS),
        *((name, ctypes.c_void_p) for name in _POINTER_FIELDS),
        *((name, ctypes.c_int64) for name in _STRIDE_FIELDS),
    )


class CompiledPagedAttention:
    """The kernel of one built `kernels` shared object as a Python callable."""

    def __init__(self, kernels_so: Path, num_threads: int = 0) -> None:
        library = ctypes.CDLL(str(kernels_so))
        self._run = library.llmc_paged_attention
        self._run.argtypes = [ctypes.POINTER(PagedAttentionArgs)]
        self._run.restype = ctypes.c_int
        self._message = library.llmc_paged_attention_message
        self._message.argtypes = [ctypes.c_int]
        self._message.restype = ctypes.c_char_p
        self.num_threads = num_threads  # 0: what OpenMP would use

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        query_start_loc: Tensor,
        layer: int,
        group: int,
        scale: float,
        window: int,
        softcap: float,
        sinks: Tensor | None,
    ) -> Tensor:
        """As `paged_attention_reference`, but for the order inside a cache block, which is the kernel's own.

        Raises:
            InternalError: the kernel refused the arguments; the message says why. Nothing was written.
        """
        out = torch.empty(q.shape, dtype=q.dtype)
        args = self.arguments(
            out,
            q,
            k,
            v,
            k_cache,
            v_cache,
            slot_mapping[group],
            block_tables[group],
            seq_lens,
            query_start_loc,
            scale,
            window,
            softcap,
            sinks,
        )
        self.run(args)
        return out

    def run(self, args: PagedAttentionArgs) -> None:
        """Run prepared arguments (`arguments`); benchmarks call this alone, so that Python's share stays out of the time."""
        status = self._run(ctypes.byref(args))
        if status != 0:
            raise InternalError(self._message(status).decode())

    def arguments(
        self,
        out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        query_start_loc: Tensor,
        scale: float,
        window: int,
        softcap: float,
        sinks: Tensor | None,
    ) -> PagedAttentionArgs:
        """Fill the C struct. `slot_mapping` [T] and `block_tables` [B, M] are those. The result keeps the tensors alive."""
        tensors = {
            "q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slot_mapping, "block_tables": block_tables,
            "seq_lens": seq_lens, "query_start_loc": query_start_loc, "out": out,
        }  # fmt: skip
        for name, tensor in tensors.items():
            if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                raise InternalError(f"paged_attention: {name} has stride {tensor.stride(-1)} in its last dimension, expected 1")
        args = PagedAttentionArgs(
            struct_size=ctypes.sizeof(PagedAttentionArgs),
            num_threads=self.num_threads,
            dtype=_DTYPES[q.dtype],
            kv_dtype=_KV_DTYPES[k_cache.dtype],
            sinks_dtype=0 if sinks is None else _DTYPES[sinks.dtype],
            scale=scale,
            softcap=softcap,
            window=window,
            num_tokens=q.shape[0],
            num_seqs=seq_lens.shape[0],
            num_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            head_dim=q.shape[2],
            num_blocks=k_cache.shape[0],
            block_size=k_cache.shape[2],
            max_blocks=block_tables.shape[1],
            sinks=None if sinks is None else sinks.data_ptr(),
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
            **{f"{name}_{which}_stride": tensors[name].stride(i) for name in ("q", "k", "v") for i, which in ((0, "token"), (1, "head"))},
            **{
                f"{name}_{which}_stride": tensors[name].stride(i)
                for name in ("k_cache", "v_cache")
                for i, which in ((0, "block"), (1, "head"))
            },
            block_table_stride=block_tables.stride(0),
        )
        args.owners = (*tensors.values(), sinks)
        return args
