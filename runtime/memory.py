"""Large regions of anonymous memory in transparent huge pages.

Why huge pages: decoding reads every weight once a token, and with 4-KiB pages two threads read 25 GB/s where they read 55 with
2-MiB pages (Xeon with AMX, virtual machine).
"""

from __future__ import annotations

import mmap

import numpy as np

from llmc.errors import ConfigError

HUGE_PAGE_BYTES = 2 << 20
TENSOR_ALIGN_BYTES = 64

NUMPY_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),  # numpy has no bfloat16; its bits are carried
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}


def allocate_huge(nbytes: int, *, what: str) -> np.ndarray:
    """Reserve `nbytes` of zeroed memory, aligned to and advised to be in huge pages. Pages appear when first written.

    The memory lives as long as the array, or a view of it, does.

    Args:
        what: for the error, as in "the KV cache".

    Returns:
        uint8 [nbytes].

    Raises:
        ConfigError: the system refuses so much memory.
    """
    try:
        region = mmap.mmap(-1, max(nbytes, 1) + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise ConfigError(
            f"{what} needs {nbytes / 1e6:.0f} MB of memory, which the system refused ({error}); lower it or free memory"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            region.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            if error.errno != 22:  # EINVAL: a kernel built without transparent huge pages; slower, still right
                raise
    whole = np.frombuffer(region, dtype=np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE_BYTES
    return whole[start : start + nbytes]


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
