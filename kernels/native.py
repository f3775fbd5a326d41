"""Call the compiled kernels from Python through their C interface: for tests, benchmarks and `ops.use_compiled`.

The runtime has its own caller; it knows the kernels only as files of an artifact.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmc.errors import InternalError

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # LLMC_* of llmc_types.h
_CODES = ("ok", "struct size differs", "bad dtype", "bad shape", "index out of range", "no AMX permission", "out of memory")

_BITS = {torch.int8: 8, torch.uint8: 4}  # of a quantised weight, by how torch holds it
ENTRY_POINTS = (
    "llmc_linear",
    "llmc_embedding",
    "llmc_grouped_linear",
    "llmc_quantized_linear",
    "llmc_quantized_embedding",
    "llmc_rms_norm",
    "llmc_gated",
    "llmc_lora_add",
)

_I64, _I32, _F64, _P = ctypes.c_int64, ctypes.c_int32, ctypes.c_double, ctypes.c_void_p


class LinearArgs(ctypes.Structure):
    """LlmcLinearArgs of linear/cpu/linear.h."""

    _fields_: ClassVar[Any] = [
        *[("struct_bytes", _I64), ("x", _P), ("weight", _P), ("bias", _P), ("y", _P), ("m", _I64), ("n", _I64), ("k", _I64)],
        *[("x_stride", _I64), ("y_stride", _I64), ("dtype", _I32), ("num_threads", _I32)],
    ]


class EmbeddingArgs(ctypes.Structure):
    """LlmcEmbeddingArgs of embedding/cpu/embedding.h."""

    _fields_: ClassVar[Any] = [
        *[("struct_bytes", _I64), ("ids", _P), ("weight", _P), ("y", _P), ("count", _I64), ("num_rows", _I64), ("k", _I64)],
        *[("y_stride", _I64), ("dtype", _I32), ("num_threads", _I32)],
    ]


class QuantizedLinearArgs(ctypes.Structure):
    """LlmcQuantizedLinearArgs of quantized_linear/cpu/quantized_linear.h."""

    _fields_: ClassVar[Any] = [
        *[("struct_bytes", _I64), ("x", _P), ("weight", _P), ("scales", _P), ("bias", _P), ("y", _P)],
        *[("m", _I64), ("n", _I64), ("k", _I64), ("x_stride", _I64), ("y_stride", _I64), ("group", _I64)],
        *[("bits", _I32), ("dtype", _I32), ("num_threads", _I32)],
    ]


class QuantizedEmbeddingArgs(ctypes.Structure):
    """LlmcQuantizedEmbeddingArgs of quantized_embedding/cpu/quantized_embedding.h."""

    _fields_: ClassVar[Any] = [
        *[("struct_bytes", _I64), ("ids", _P), ("weight", _P), ("scales", _P), ("y", _P)],
        *[("count", _I64), ("num_rows", _I64), ("k", _I64), ("y_stride", _I64), ("group", _I64)],
        *[("bits", _I32), ("dtype", _I32), ("num_threads", _I32)],
    ]


class GroupedLinearArgs(ctypes.Structure):
    """LlmcGroupedLinearArgs of grouped_linear/cpu/grouped_linear.h."""

    _fields_: ClassVar[Any] = [
        *[("struct_bytes", _I64), ("x", _P), ("weight", _P), ("expert_ids", _P), ("bias", _P), ("y", _P)],
        *[("m", _I64), ("n", _I64), ("k", _I64), ("num_experts", _I64), ("x_stride", _I64), ("y_stride", _I64)],
        *[("dtype", _I32), ("num_threads", _I32)],
    ]


class RmsNormArgs(ctypes.Structure):
    """LlmcRmsNormArgs of rms_norm/cpu/rms_norm.h."""

    _fields_: ClassVar[Any] = [
        *[("struct_bytes", _I64), ("x", _P), ("residual", _P), ("weight", _P), ("y", _P), ("sum", _P)],
        *[("m", _I64), ("n", _I64), ("x_stride", _I64), ("residual_stride", _I64), ("eps", _F64), ("offset", _F64)],
        *[("round_first", _I32), ("dtype", _I32), ("weight_dtype", _I32), ("num_threads", _I32)],
    ]


class GatedArgs(ctypes.Structure):
    """LlmcGatedArgs of silu_mul/cpu/silu_mul.h."""

    _fields_: ClassVar[Any] = [
        *[("struct_bytes", _I64), ("gate", _P), ("up", _P), ("y", _P), ("m", _I64), ("n", _I64), ("gate_stride", _I64)],
        *[("up_stride", _I64), ("activation", _I32), ("dtype", _I32), ("num_threads", _I32), ("unused", _I32)],
    ]


class LoraAddArgs(ctypes.Structure):
    """LlmcLoraAddArgs of lora_add/cpu/lora_add.h."""

    _fields_: ClassVar[Any] = [
        *[("struct_bytes", _I64), ("y", _P), ("x", _P), ("slots", _P), ("pool", _P), ("out", _P), ("sizes", _P), ("offsets", _P)],
        *[("m", _I64), ("n", _I64), ("k", _I64), ("y_stride", _I64), ("x_stride", _I64), ("num_slots", _I64), ("slot_elements", _I64)],
        *[("num_parts", _I64), ("rank", _I64), ("dtype", _I32), ("pool_dtype", _I32), ("num_threads", _I32), ("unused", _I32)],
    ]


class NativeKernels:
    """One built kernels shared object. Several, of different levels, can be open in one process."""

    def __init__(self, kernels_so: Path, num_threads: int = 0) -> None:
        """Open the file. torch is imported above, so its OpenMP runtime is the one the kernels bind to.

        Args:
            kernels_so: `BuiltKernels.kernels_so`.
            num_threads: threads per call; 0 takes OpenMP's choice.
        """
        self.num_threads = num_threads
        self.library = ctypes.CDLL(str(kernels_so), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        for name in ENTRY_POINTS:
            if hasattr(self.library, name):  # a build of some ops alone lacks the others
                getattr(self.library, name).restype = _I32

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
        """The op `llmc::linear`, by the compiled kernel."""
        k = x.shape[-1]
        rows = x.reshape(-1, k)
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        y = x.new_empty((*x.shape[:-1], out_features))
        args = LinearArgs(
            x=rows.data_ptr(), weight=weight.data_ptr(), bias=_pointer(bias), y=y.data_ptr(), m=rows.shape[0], n=out_features, k=k,
            x_stride=rows.stride(0), y_stride=out_features, dtype=_DTYPES[x.dtype], num_threads=self.num_threads,
        )  # fmt: skip
        self._call("llmc_linear", args)
        return y

    def embedding(self, ids: Tensor, weight: Tensor, embedding_dim: int) -> Tensor:
        """The op `llmc::embedding`, by the compiled kernel."""
        ids = ids.contiguous()
        y = weight.new_empty((*ids.shape, embedding_dim))
        args = EmbeddingArgs(
            ids=ids.data_ptr(), weight=weight.data_ptr(), y=y.data_ptr(), count=ids.numel(), num_rows=weight.shape[0] * 16,
            k=embedding_dim, y_stride=embedding_dim, dtype=_DTYPES[weight.dtype], num_threads=self.num_threads,
        )  # fmt: skip
        self._call("llmc_embedding", args)
        return y

    def grouped_linear(self, x: Tensor, weight: Tensor, expert_ids: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
        """The op `llmc::grouped_linear`, by the compiled kernel."""
        x, expert_ids = x if x.stride(-1) == 1 else x.contiguous(), expert_ids.contiguous()
        y = x.new_empty((x.shape[0], out_features))
        args = GroupedLinearArgs(
            x=x.data_ptr(), weight=weight.data_ptr(), expert_ids=expert_ids.data_ptr(), bias=_pointer(bias), y=y.data_ptr(),
            m=x.shape[0], n=out_features, k=x.shape[1], num_experts=weight.shape[0], x_stride=x.stride(0), y_stride=out_features,
            dtype=_DTYPES[x.dtype], num_threads=self.num_threads,
        )  # fmt: skip
        self._call("llmc_grouped_linear", args)
        return y

    def quantized_linear(self, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, out_features: int, group: int) -> Tensor:
        """The op `llmc::quantized_linear`, by the compiled kernel."""
        k = x.shape[-1]
        rows = x.reshape(-1, k)
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        y = x.new_empty((*x.shape[:-1], out_features))
        args = QuantizedLinearArgs(
            x=rows.data_ptr(), weight=weight.data_ptr(), scales=scales.data_ptr(), bias=_pointer(bias), y=y.data_ptr(), m=rows.shape[0],
            n=out_features, k=k, x_stride=rows.stride(0), y_stride=out_features, group=group, bits=_BITS[weight.dtype],
            dtype=_DTYPES[x.dtype], num_threads=self.num_threads,
        )  # fmt: skip
        self._call("llmc_quantized_linear", args)
        return y

    def quantized_embedding(self, ids: Tensor, weight: Tensor, scales: Tensor, embedding_dim: int, group: int) -> Tensor:
        """The op `llmc::quantized_embedding`, by the compiled kernel."""
        ids = ids.contiguous()
        y = scales.new_empty((*ids.shape, embedding_dim))
        args = QuantizedEmbeddingArgs(
            ids=ids.data_ptr(), weight=weight.data_ptr(), scales=scales.data_ptr(), y=y.data_ptr(), count=ids.numel(),
            num_rows=weight.shape[0] * 16, k=embedding_dim, y_stride=embedding_dim, group=group, bits=_BITS[weight.dtype],
            dtype=_DTYPES[scales.dtype], num_threads=self.num_threads,
        )  # fmt: skip
        self._call("llmc_quantized_embedding", args)
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> Tensor:
        """The op `llmc::rms_norm`, by the compiled kernel."""
        return self._norm(x, None, weight, eps, offset, round_first)[0]

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool
    ) -> tuple[Tensor, Tensor]:
        """The op `llmc::add_rms_norm`, by the compiled kernel."""
        normal, summed = self._norm(x, residual, weight, eps, offset, round_first)
        assert summed is not None
        return normal, summed

    def _norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, round_first: bool
    ) -> tuple[Tensor, Tensor | None]:
        rows, added = _rows(x), None if residual is None else _rows(residual)
        y, summed = x.new_empty(x.shape), None if residual is None else x.new_empty(x.shape)
        args = RmsNormArgs(
            x=rows.data_ptr(), residual=_pointer(added), weight=weight.data_ptr(), y=y.data_ptr(), sum=_pointer(summed),
            m=rows.shape[0], n=rows.shape[1], x_stride=rows.stride(0), residual_stride=0 if added is None else added.stride(0),
            eps=eps, offset=offset, round_first=round_first, dtype=_DTYPES[x.dtype], weight_dtype=_DTYPES[weight.dtype],
            num_threads=self.num_threads,
        )  # fmt: skip
        self._call("llmc_rms_norm", args)
        return y, summed

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """The op `llmc::silu_mul`, by the compiled kernel."""
        return self._gated(gate, up, 0)

    def gelu_mul(self, gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
        """The op `llmc::gelu_mul`, by the compiled kernel."""
        return self._gated(gate, up, 2 if tanh else 1)

    def _gated(self, gate: Tensor, up: Tensor, activation: int) -> Tensor:
        left, right, y = _rows(gate), _rows(up), gate.new_empty(gate.shape)
        args = GatedArgs(
            gate=left.data_ptr(), up=right.data_ptr(), y=y.data_ptr(), m=left.shape[0], n=left.shape[1], gate_stride=left.stride(0),
            up_stride=right.stride(0), activation=activation, dtype=_DTYPES[gate.dtype], num_threads=self.num_threads,
        )  # fmt: skip
        self._call("llmc_gated", args)
        return y

    def lora_add(
        self, y: Tensor, x: Tensor, slots: Tensor, pool: Tensor, rank: int, sizes: Sequence[int], offsets: Sequence[int]
    ) -> Tensor:
        """The op `llmc::lora_add`, by the compiled kernel."""
        rows, inputs, slots = _rows(y), _rows(x), slots.contiguous()
        out = y.new_empty(y.shape)
        parts = (_I64 * len(sizes))(*sizes), (_I64 * len(offsets))(*offsets)
        args = LoraAddArgs(
            y=rows.data_ptr(), x=inputs.data_ptr(), slots=slots.data_ptr(), pool=pool.data_ptr(), out=out.data_ptr(),
            sizes=ctypes.addressof(parts[0]), offsets=ctypes.addressof(parts[1]), m=rows.shape[0], n=rows.shape[1], k=inputs.shape[1],
            y_stride=rows.stride(0), x_stride=inputs.stride(0), num_slots=pool.shape[0], slot_elements=pool.shape[1], num_parts=len(sizes),
            rank=rank, dtype=_DTYPES[y.dtype], pool_dtype=_DTYPES[pool.dtype], num_threads=self.num_threads,
        )  # fmt: skip
        self._call("llmc_lora_add", args)
        return out

    def _call(self, name: str, args: ctypes.Structure) -> None:
        args.struct_bytes = ctypes.sizeof(args)
        code = getattr(self.library, name)(ctypes.byref(args))
        if code != 0:
            reason = _CODES[code] if code < len(_CODES) else f"code {code}"
            raise InternalError(f"{name} refused its arguments: {reason}")


def _rows(x: Tensor) -> Tensor:
    """[..., n] as [m, n] with contiguous rows."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
