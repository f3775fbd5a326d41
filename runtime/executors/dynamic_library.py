"""dlopen without holding the interpreter lock, so that weights are read while code is mapped (ctypes.CDLL keeps the lock)."""

from __future__ import annotations

import ctypes
import os


def open_library(path: str, *, shared: bool, own_first: bool = False) -> ctypes.CDLL:
    """Map a shared object.

    Args:
        path: file to map.
        shared: its symbols serve libraries loaded later.
        own_first: it takes what it lacks from the libraries it names, whatever the process holds besides.

    Raises:
        OSError: with the loader's own words.
    """
    process = ctypes.CDLL(None)
    process.dlopen.argtypes, process.dlopen.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    process.dlerror.restype = ctypes.c_char_p
    mode = os.RTLD_NOW | (os.RTLD_GLOBAL if shared else os.RTLD_LOCAL) | (os.RTLD_DEEPBIND if own_first else 0)
    handle = process.dlopen(os.fsencode(path), mode)
    if not handle:
        raise OSError((process.dlerror() or b"no reason given").decode(errors="replace"))
    return ctypes.CDLL(path, handle=handle)
