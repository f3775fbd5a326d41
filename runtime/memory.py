"""Large regions of anonymous memory in transparent huge pages.

Why huge pages: decoding reads every weight once a token, and with 4-KiB pages two threads read 25 GB/s where they read 55 with
2-MiB pages (Xeon with AMX, virtual machine).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import numpy as np

from llmc.errors import ConfigError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

HUGE_PAGE_BYTES = 2 << 20
TENSOR_ALIGN_BYTES = 64

# MAP_NORESERVE: a KV cache is reserved for the most sequences there may be; what is never written never takes memory
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


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
        region = mmap.mmap(-1, max(nbytes, 1) + HUGE_PAGE_BYTES, flags=_FLAGS)
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


def available_bytes() -> int:
    """Memory this process may still take: what the system calls available, within the control group's limit."""
    found = []
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file():
        text = limit.read_text().strip()
        if text != "max":
            found.append(max(0, int(text) - int(used.read_text())))
    if not found:
        raise ConfigError("/proc/meminfo tells no MemAvailable; give the size of the KV cache with --kv-cache-memory-bytes")
    return min(found)


def keep_freed_memory() -> None:
    """Ask the C library to keep freed memory for the next step.

    A step allocates and frees megabytes of intermediate tensors; given back to the system each time, every page of them would
    fault in again. Changes the whole process; other C libraries than glibc keep their own way.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # glibc takes no larger value
        mallopt(_M_TRIM_THRESHOLD, 512 << 20)
