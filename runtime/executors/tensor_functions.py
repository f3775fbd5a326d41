"""Tensor handles through AOTInductor's C interface, by whichever library serves it: the artifact's own tensor runtime, or libtorch.

Source: torch/csrc/inductor/aoti_torch/c/shim.h.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from llmc.artifacts.dtypes import NUMPY
from llmc.errors import ConfigError, InternalError

# c10::ScalarType values, part of the stable interface (aoti_torch_dtype_*)
DTYPE_CODES = {"uint8": 0, "int8": 1, "int32": 3, "int64": 4, "float16": 5, "float32": 6, "bool": 11, "bfloat16": 15}
_CPU = 0
_HANDLE = ctypes.c_void_p


class TensorFunctions(ABC):
    """The functions the runtime calls.

    Args:
        library: mapped already.
        name: for errors, as in "the installed torch".
        remedy: what to do if a function is missing.

    Raises:
        ConfigError: the library lacks one.
    """

    def __init__(self, library: ctypes.CDLL, *, name: str, remedy: str) -> None:
        self.name = name
        self._remedy = remedy
        self._library = library
        # PyDLL keeps the interpreter lock: these calls take a fraction of a microsecond, less than giving it away and back
        quick = ctypes.PyDLL(library._name, handle=library._handle)
        int64_p = ctypes.POINTER(ctypes.c_int64)
        self._from_blob = self._bind(
            quick,
            "aoti_torch_create_tensor_from_blob",
            [_HANDLE, ctypes.c_int64, int64_p, int64_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, _HANDLE],
        )
        self.new_handle = self._bind(quick, "aoti_torch_new_tensor_handle", [_HANDLE, _HANDLE])
        self.delete = self._bind(quick, "aoti_torch_delete_tensor_object", [_HANDLE])
        self._data_ptr = self._bind(quick, "aoti_torch_get_data_ptr", [_HANDLE, _HANDLE])
        self._dim = self._bind(quick, "aoti_torch_get_dim", [_HANDLE, _HANDLE])
        self._sizes = self._bind(quick, "aoti_torch_get_sizes", [_HANDLE, _HANDLE])
        self._dtype = self._bind(quick, "aoti_torch_get_dtype", [_HANDLE, _HANDLE])
        self._is_contiguous = self._bind(quick, "aoti_torch_is_contiguous", [_HANDLE, _HANDLE])

    def tensor(self, address: int, shape: tuple[int, ...], dtype: str) -> int:
        """A handle to a contiguous CPU tensor over memory the caller keeps alive; freed with `delete`."""
        strides = [1] * len(shape)
        for axis in range(len(shape) - 2, -1, -1):
            strides[axis] = strides[axis + 1] * shape[axis + 1]
        extent = ctypes.c_int64 * len(shape)
        handle = _HANDLE()
        status = self._from_blob(
            address, len(shape), extent(*shape), extent(*strides), 0, DTYPE_CODES[dtype], _CPU, 0, ctypes.addressof(handle)
        )
        if status or not handle.value:
            said = self.message() or f"status {status}"
            raise InternalError(f"{self.name} made no tensor of shape {shape} and dtype {dtype} ({said}); please report this")
        return handle.value

    def read(self, handle: int, *, dtype: str) -> np.ndarray:
        """The data of a contiguous CPU tensor as a numpy view, valid while the handle lives. bfloat16 comes as uint16."""
        dim, code, pointer, sizes, contiguous = ctypes.c_int64(), ctypes.c_int32(), _HANDLE(), _HANDLE(), ctypes.c_bool()
        status = self._dim(handle, ctypes.addressof(dim)) | self._dtype(handle, ctypes.addressof(code))
        status |= self._data_ptr(handle, ctypes.addressof(pointer)) | self._sizes(handle, ctypes.addressof(sizes))
        status |= self._is_contiguous(handle, ctypes.addressof(contiguous))
        if status or code.value != DTYPE_CODES[dtype] or not contiguous.value:
            raise InternalError(f"the program gave a tensor that is not contiguous {dtype} (dtype code {code.value}); please report this")
        shape = tuple((ctypes.c_int64 * dim.value).from_address(sizes.value)) if dim.value and sizes.value else ()
        return view_memory(pointer.value or 0, shape, dtype)

    @abstractmethod
    def set_num_threads(self, count: int) -> None:
        """Threads of parallel regions that the calling thread starts."""

    def message(self) -> str:
        """What the last failed call said, "" if nothing."""
        return ""

    def _bind(self, library: ctypes.CDLL, name: str, argtypes: list[Any]) -> Any:  # a ctypes function, a type without a public name
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise ConfigError(f"{self.name} has no {name}; {self._remedy}") from error
        function.argtypes = argtypes
        function.restype = ctypes.c_int32
        return function


def view_memory(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A numpy array over memory somebody else keeps alive."""
    kind = NUMPY[dtype]
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return np.empty(shape, dtype=kind)
    memory = (ctypes.c_char * (count * kind.itemsize)).from_address(address)
    return np.frombuffer(memoryview(memory), dtype=kind).reshape(shape)
