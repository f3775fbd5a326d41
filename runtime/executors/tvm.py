"""Runs a model image that TVM compiled, over TVM's runtime library alone: no Python of TVM's, and no torch.

Mirrors the C interface at the end of compiler/tvm/step.cpp.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from llmc.artifacts.dtypes import NUMPY
from llmc.artifacts.manifest import Entry, KVFacts
from llmc.errors import ArtifactError, InternalError
from llmc.runtime.executors.kv_cache import KVCache, cache_input
from llmc.runtime.executors.logits import Logits, LogitsBuffer
from llmc.runtime.executors.tensor_functions import view_memory
from llmc.runtime.step import DeviceBatch
from llmc.runtime.weights import Weights

_MAX_DIMS = 8
# DLPack's type codes and bits. Source: dlpack.h, DLDataTypeCode.
_DTYPES = {
    "int8": (0, 8), "int32": (0, 32), "int64": (0, 64), "uint8": (1, 8), "float16": (2, 16), "float32": (2, 32), "bfloat16": (4, 16),
}  # fmt: skip


class _Tensor(ctypes.Structure):
    """LlmcTvmTensor."""

    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("code", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("dim", ctypes.c_int64),
        ("shape", ctypes.c_int64 * _MAX_DIMS),
    ]


class TvmExecutor:
    """An `Executor` over one entry that TVM compiled.

    Args:
        entry: the program's inputs, then its constants, named by their place behind the inputs: "0", "1", ...
        kv: how the KV cache is cut.
        image: the loaded model image; TVM's runtime and the kernels are loaded before it.
        weights: stays alive as long as this object, which gives the program their addresses.
        num_threads: of llmc's kernels. What TVM generated runs on one.

    Raises:
        ArtifactError: the image and the manifest disagree.
    """

    def __init__(self, *, entry: Entry, kv: KVFacts, image: ctypes.CDLL, weights: Weights, num_threads: int) -> None:
        self._entry = entry
        self._kv_facts = kv
        self._image = image
        self._weights = weights
        self._num_threads = num_threads
        self._program = ctypes.c_void_p()
        self._cache: KVCache | None = None
        self._varying: list[tuple[str, str, int, _Tensor]] = []  # name, dtype, place among the arguments, what is handed over
        if len(entry.outputs) != 1:
            raise ArtifactError(f"entry {entry.name}: {len(entry.outputs)} outputs where the logits alone are expected; compile again")
        unknown = [s.name for s in entry.inputs if s.name not in DeviceBatch.__dataclass_fields__ and cache_input(s.name) is None]
        if unknown:
            raise ArtifactError(f"entry {entry.name}: this runtime has no input named {unknown[0]!r}; upgrade llmc or compile again")
        self._output_dtype = entry.outputs[0].dtype
        self._logits = LogitsBuffer(self._output_dtype)
        self._message = self._function("llmc_tvm_message", [], ctypes.c_char_p)
        self._set = self._function("llmc_tvm_set", [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p])
        self._run = self._function("llmc_tvm_run", [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p])
        self._close = self._function("llmc_tvm_close", [ctypes.c_void_p], None)
        opening = self._function("llmc_tvm_open", [ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p])
        names = _names_in_order(entry)
        if opening(image._name.encode(), len(entry.inputs) + len(names), ctypes.byref(self._program)):
            raise ArtifactError(f"entry {entry.name}: {self._said()}; compile the artifact again")
        for place, tensor in enumerate(names, start=len(entry.inputs)):
            view = weights.views.get(tensor)
            if view is None:
                raise ArtifactError(f"entry {entry.name}: no weight is bound to the program's constant {tensor!r}; compile again")
            self._give(place, _described(view.dtype, view.address, view.shape))

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate K and V of every layer, zeroed, in huge pages, and give them to the program."""
        if self._cache is not None:
            raise InternalError("the KV cache was allocated twice; please report this")
        self._cache = KVCache(self._kv_facts, num_blocks)
        for place, spec in enumerate(self._entry.inputs):
            owner = cache_input(spec.name)
            if owner is None:
                self._varying.append((spec.name, spec.dtype, place, _described(spec.dtype, 0, (0,) * len(spec.shape))))
            else:
                array = self._cache.tensor(*owner)
                self._give(place, _described(spec.dtype, array.ctypes.data, array.shape))

    def run(self, batch: DeviceBatch) -> Logits:
        """One step. Returns logits [N, vocab_size], valid until the next call.

        Raises:
            InternalError: the program failed; its own message is in the error.
        """
        if self._cache is None:
            raise InternalError("a step ran before the KV cache was allocated; please report this")
        for name, dtype, place, tensor in self._varying:
            array: np.ndarray = getattr(batch, name)
            if array.dtype != NUMPY[dtype] or not array.flags.c_contiguous or array.ndim != tensor.dim:
                raise InternalError(
                    f"input {name} is {array.dtype} {array.shape}; contiguous {dtype} of {tensor.dim} dimensions is expected"
                )
            tensor.data = array.__array_interface__["data"][0]
            tensor.shape[: array.ndim] = array.shape
            self._give(place, tensor)
        out = _Tensor()
        if self._run(self._program, self._num_threads, ctypes.byref(out)):
            raise InternalError(f"the compiled program failed in a step of {len(batch.input_ids)} tokens: {self._said()}")
        if (out.code, out.bits) != _DTYPES[self._output_dtype] or out.dim < 1:
            raise InternalError(f"the program gave logits of type code {out.code} with {out.bits} bits; please report this")
        found = view_memory(out.data or 0, tuple(out.shape[: out.dim]), self._output_dtype)
        logits = found.reshape(-1, found.shape[-1])  # [1, N, V] has the same elements
        if len(logits) != len(batch.logits_indices):
            raise InternalError(f"the program gave {len(logits)} rows of logits for {len(batch.logits_indices)}; please report this")
        return Logits(logits, self._logits)

    def close(self) -> None:
        """Free the program and the KV cache. The images stay mapped until the process ends."""
        if self._program.value:
            self._close(self._program)
            self._program = ctypes.c_void_p()
        self._varying, self._cache = [], None

    def _give(self, place: int, tensor: _Tensor) -> None:
        if self._set(self._program, place, ctypes.byref(tensor)):
            raise InternalError(f"the compiled program does not take its argument {place}: {self._said()}; please report this")

    def _said(self) -> str:
        text = (self._message() or b"").decode(errors="replace").strip() or "no message"
        return " ".join(text.split())[:2000]

    def _function(self, name: str, argtypes: list[Any], restype: Any = ctypes.c_int32) -> Any:  # a ctypes function
        try:
            function = getattr(self._image, name)
        except AttributeError as error:
            raise ArtifactError(f"entry {self._entry.name}: the model image has no {name}; compile the artifact again") from error
        function.argtypes, function.restype = argtypes, restype
        return function


def _names_in_order(entry: Entry) -> list[str]:
    """Tensor names of the constants, in the order the program takes them."""
    places = [str(place) for place in range(len(entry.constants))]
    if set(places) != set(entry.constants):
        raise ArtifactError(f"entry {entry.name}: its constants are not numbered from 0 without gaps; compile again")
    return [entry.constants[place] for place in places]


def _described(dtype: str, address: int, shape: Sequence[int]) -> _Tensor:
    if dtype not in _DTYPES or len(shape) > _MAX_DIMS:
        raise ArtifactError(f"a tensor of {dtype} with {len(shape)} dimensions, which no program of TVM's takes; compile again")
    code, bits = _DTYPES[dtype]
    tensor = _Tensor(data=address or None, code=code, bits=bits, dim=len(shape))
    tensor.shape[: len(shape)] = shape
    return tensor
