"""dlopen without holding the interpreter lock, so that weights are read while code is mapped (ctypes.CDLL keeps the lock)."""

from __future__ import annotations

import ctypes
import os


def open_library(path: str, *, shared: bool) -> ctypes.CDLL:
    """Map a shared object.

    Args:
        path: file to map.
        shared: its symbols serve libraries loaded later.

    Raises:
        OSError: with the loader's own words.
    """
    process = ctypes.CDLL(None)
    process.dlopen.argtypes, process.dlopen.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    process.dlerror.restype = ctypes.c_char_p
    handle = process.dlopen(os.fsencode(path), os.RTLD_NOW | (os.RTLD_GLOBAL if shared else os.RTLD_LOCAL))
    if not handle:
        raise OSError((process.dlerror() or b"no reason given").decode(errors="replace"))
    return ctypes.CDLL(path, handle=handle)
