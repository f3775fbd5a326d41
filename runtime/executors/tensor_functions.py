"""Tensor handles through AOTInductor's C interface, by whichever library serves it: the artifact's own tensor runtime, or libtorch.

Source: torch/csrc/inductor/aoti_torch/c/shim.h.
"""

from __future__ import annotations

import ctypes
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

from llmc.artifacts.dtypes import NUMPY
from llmc.errors import ConfigError, InternalError

# c10::ScalarType values, part of the stable interface (aoti_torch_dtype_*)
DTYPE_CODES = {"uint8": 0, "int8": 1, "int32": 3, "int64": 4, "float16": 5, "float32": 6, "bool": 11, "bfloat16": 15}
_CPU = 0
_HANDLE = ctypes.c_void_p
_MAX_VIEWS = 64  # of one output; memory for tensors is taken from few places again and again


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
        self.data_ptr = self._bind(quick, "aoti_torch_get_data_ptr", [_HANDLE, _HANDLE])
        self.dim = self._bind(quick, "aoti_torch_get_dim", [_HANDLE, _HANDLE])
        self.sizes = self._bind(quick, "aoti_torch_get_sizes", [_HANDLE, _HANDLE])
        self.dtype = self._bind(quick, "aoti_torch_get_dtype", [_HANDLE, _HANDLE])
        self.is_contiguous = self._bind(quick, "aoti_torch_is_contiguous", [_HANDLE, _HANDLE])

    def tensor(self, address: int, shape: tuple[int, ...], dtype: str) -> ctypes.c_void_p:
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
        return handle

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


class _Described(ctypes.Structure):
    """What the functions of `OutputReader` write."""

    _fields_: ClassVar = [
        ("dim", ctypes.c_int64),
        ("data", _HANDLE),
        ("sizes", _HANDLE),
        ("dtype", ctypes.c_int32),
        ("contiguous", ctypes.c_bool),
    ]


class OutputReader:
    """Reads one output of a program, step after step.

    Args:
        tensors: the C interface that made the output.
        dtype: what it has to be, by the manifest's name.
    """

    def __init__(self, tensors: TensorFunctions, dtype: str) -> None:
        self._dtype = dtype
        self._code = DTYPE_CODES[dtype]
        self._found = found = _Described()
        # As ctypes objects: made once, where a Python integer is turned into one at every call
        self._address, *self._others = (
            (function, _HANDLE(ctypes.addressof(found) + field.offset))
            for function, field in (
                (tensors.data_ptr, _Described.data),
                (tensors.dim, _Described.dim),
                (tensors.dtype, _Described.dtype),
                (tensors.sizes, _Described.sizes),
                (tensors.is_contiguous, _Described.contiguous),
            )
        )
        self._views: dict[int | None, np.ndarray] = {}

    def read(self, handle: _HANDLE) -> np.ndarray:
        """The data of a contiguous CPU tensor as a numpy view, valid while the handle lives. bfloat16 comes as uint16.

        Until `forget` all that is read has one shape; only where it lies is asked every time.

        Raises:
            InternalError: it is of another dtype, or not contiguous.
        """
        function, place = self._address
        status, found = function(handle, place), self._found
        view = self._views.get(found.data)
        if view is None or status:
            for function, place in self._others:
                status |= function(handle, place)
            if status or found.dtype != self._code or not found.contiguous:
                raise InternalError(
                    f"the program gave a tensor that is not contiguous {self._dtype} (dtype code {found.dtype}); please report this"
                )
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            shape = tuple((ctypes.c_int64 * found.dim).from_address(found.sizes)) if found.dim and found.sizes else ()
            view = self._views[found.data] = view_memory(found.data or 0, shape, self._dtype)
        return view

    def forget(self) -> None:
        """The shapes of the program's inputs change, so its output's may."""
        self._views.clear()


def view_memory(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A numpy array over memory somebody else keeps alive."""
    kind = NUMPY[dtype]
    count = math.prod(shape)
    if count == 0:
        return np.empty(shape, dtype=kind)
    memory = (ctypes.c_char * (count * kind.itemsize)).from_address(address)
    return np.frombuffer(memoryview(memory), dtype=kind).reshape(shape)
