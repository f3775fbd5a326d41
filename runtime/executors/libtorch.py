"""libtorch's stable C interface through ctypes, without importing Python's torch.

Loading libtorch_cpu alone costs 0.1 to 0.25 s and 115 MB; `import torch` costs 0.7 to 2 s and 245 MB.
Source: torch/csrc/inductor/aoti_torch/c/shim.h.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from pathlib import Path
from typing import Any

import numpy as np

from llmc.artifacts.dtypes import NUMPY
from llmc.errors import ConfigError, InternalError
from llmc.runtime.executors.dynamic_library import open_library

# c10::ScalarType values, part of the stable interface (aoti_torch_dtype_*)
DTYPE_CODES = {"uint8": 0, "int8": 1, "int32": 3, "int64": 4, "float16": 5, "float32": 6, "bool": 11, "bfloat16": 15}
_CPU = 0
_HANDLE = ctypes.c_void_p


class LibTorch:
    """The functions of libtorch_cpu the runtime calls. One per process is enough; loading twice gives the same library.

    Raises:
        ConfigError: torch is not installed here.
    """

    def __init__(self) -> None:
        self.path = find_libtorch()
        # shared: model images leave the C interface undefined and find it here
        library = open_library(str(self.path), shared=True)
        # PyDLL keeps the interpreter lock: these calls take a fraction of a microsecond, less than giving it away and back
        quick = ctypes.PyDLL(str(self.path), handle=library._handle)
        int64_p = ctypes.POINTER(ctypes.c_int64)
        self._from_blob = _bind(
            quick,
            "aoti_torch_create_tensor_from_blob",
            [_HANDLE, ctypes.c_int64, int64_p, int64_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, _HANDLE],
        )
        self.new_handle = _bind(quick, "aoti_torch_new_tensor_handle", [_HANDLE, _HANDLE])
        self.delete = _bind(quick, "aoti_torch_delete_tensor_object", [_HANDLE])
        self._data_ptr = _bind(quick, "aoti_torch_get_data_ptr", [_HANDLE, _HANDLE])
        self._dim = _bind(quick, "aoti_torch_get_dim", [_HANDLE, _HANDLE])
        self._sizes = _bind(quick, "aoti_torch_get_sizes", [_HANDLE, _HANDLE])
        self._dtype = _bind(quick, "aoti_torch_get_dtype", [_HANDLE, _HANDLE])
        self._is_contiguous = _bind(quick, "aoti_torch_is_contiguous", [_HANDLE, _HANDLE])
        self._library = library

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
            raise InternalError(f"libtorch made no tensor of shape {shape} and dtype {dtype} (status {status}); please report this")
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

    def set_num_threads(self, count: int) -> None:
        """Threads of parallel regions started by the calling thread: libtorch's, and OpenMP's, which kernels use."""
        try:
            set_at = self._library._ZN2at15set_num_threadsEi  # at::set_num_threads(int); no C function does the same
        except AttributeError as error:
            raise ConfigError(f"{self.path} has no at::set_num_threads; torch 2.11 to 2.13 is expected here") from error
        set_at(ctypes.c_int(count))
        self._library.omp_set_num_threads(ctypes.c_int(count))


_loading = threading.Lock()
_loaded: list[LibTorch] = []


def load_libtorch() -> LibTorch:
    """The process's LibTorch, loaded at the first call. A library is process-wide by nature, so this is too."""
    with _loading:
        if not _loaded:
            _loaded.append(LibTorch())
        return _loaded[0]


def find_libtorch() -> Path:
    """libtorch_cpu.so of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "lib" / "libtorch_cpu.so"
        if path.is_file():
            return path
    raise ConfigError("this artifact's code needs libtorch_cpu.so, but torch is not installed here; pip install torch")


def view_memory(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A numpy array over memory somebody else keeps alive."""
    kind = NUMPY[dtype]
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return np.empty(shape, dtype=kind)
    memory = (ctypes.c_char * (count * kind.itemsize)).from_address(address)
    return np.frombuffer(memoryview(memory), dtype=kind).reshape(shape)


def _bind(library: ctypes.CDLL, name: str, argtypes: list[Any]) -> Any:  # a ctypes function; ctypes has no public name for its type
    try:
        function = getattr(library, name)
    except AttributeError as error:
        raise ConfigError(f"the installed torch has no {name}; torch 2.11 to 2.13 is expected here") from error
    function.argtypes = argtypes
    function.restype = ctypes.c_int32
    return function
