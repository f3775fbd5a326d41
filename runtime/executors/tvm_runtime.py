"""TVM's runtime, without its Python: libtvm_ffi and libtvm_runtime of the installed apache-tvm, mapped through ctypes.

`import tvm` would bring the compiler (259 MB of code), and `import tvm_ffi` brings torch wherever torch is installed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from pathlib import Path

from llmc.errors import ConfigError
from llmc.runtime.executors.dynamic_library import open_library

# In this order: the second asks for the first by its name.
_LIBRARIES = (("tvm_ffi", "libtvm_ffi.so"), ("tvm", "libtvm_runtime.so"))
_lock = threading.Lock()
_opened: list[ctypes.CDLL] = []  # process-wide by nature


def open_tvm_runtime() -> None:
    """Map the libraries that a model image of executor "tvm" calls, once per process.

    Raises:
        ConfigError: apache-tvm is not installed here, or does not load.
    """
    with _lock:
        for package, name in _LIBRARIES[len(_opened) :]:
            path = find_library(package, name)
            try:
                _opened.append(open_library(str(path), shared=True))
            except OSError as error:
                raise ConfigError(f"{path} cannot be loaded: {error}; install apache-tvm again: pip install 'llmc[tvm]'") from error


def find_library(package: str, name: str) -> Path:
    """A library of an installed package, found without importing it.

    Raises:
        ConfigError: it is not there.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "lib" / name
        if path.is_file():
            return path
    raise ConfigError(f"this artifact was compiled by TVM and needs {name}, which is not installed here; pip install 'llmc[tvm]'")
