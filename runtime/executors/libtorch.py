"""libtorch's tensors through ctypes, without importing Python's torch: for artifacts whose code calls what only libtorch has, for those
compiled before there was a tensor runtime, and as the tensor runtime's oracle.

Loading libtorch_cpu costs 0.1 to 0.25 s and 115 MB; `import torch` costs 0.7 to 2 s and 245 MB.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from pathlib import Path

from llmc.errors import ConfigError
from llmc.runtime.executors.dynamic_library import open_library
from llmc.runtime.executors.tensor_functions import TensorFunctions

_REMEDY = "torch 2.11 to 2.13 is expected here"


class LibTorch(TensorFunctions):
    """libtorch_cpu of the installed torch. One per process is enough; loading twice gives the same library.

    Raises:
        ConfigError: torch is not installed here.
    """

    def __init__(self) -> None:
        self.path = find_libtorch()
        # shared: model images leave the C interface undefined and find it here
        super().__init__(open_library(str(self.path), shared=True), name="the installed torch", remedy=_REMEDY)

    def set_num_threads(self, count: int) -> None:
        """libtorch's threads, and OpenMP's, which kernels use."""
        try:
            set_at = self._library._ZN2at15set_num_threadsEi  # at::set_num_threads(int); no C function does the same
        except AttributeError as error:
            raise ConfigError(f"{self.path} has no at::set_num_threads; {_REMEDY}") from error
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
