"""Weights that are mapped from their files at the start, and move into memory of their own while the engine already answers.

A start copies nothing then: it hashes the files' pages where the page cache has them. Behind it, one thread of low priority copies
chunk by chunk into huge pages, hashes the copy, and puts it at the chunk's address in one call of the system (mremap), so that programs
keep the addresses they were given, and a step that runs meanwhile reads the same bits before and after. New memory is what takes the time:
a virtual machine that never used a page before gets 0.5 GB a second, against 6 GB of mapping.

Until a chunk has moved, it is the page cache's and changes with its file. The hash of the copy finds that, and ends the engine.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Sequence

import numpy as np

from llmc.artifacts.weight_source import WeightSource
from llmc.errors import ConfigError, DeviceLost
from llmc.runtime.memory import HUGE_PAGE_BYTES, round_up

_MAP_FIXED, _MREMAP_MAYMOVE, _MREMAP_FIXED, _MADV_POPULATE_READ = 0x10, 1, 2, 22  # mman.h
_FAILED = ctypes.c_void_p(-1).value
_NICE = 10  # a tenth of a core that steps keep busy, all of an idle one

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def can_move(source: WeightSource) -> bool:
    """Whether the file's chunks are whole huge pages, as llmc writes them."""
    return source.chunk_bytes % HUGE_PAGE_BYTES == 0


def map_over(source: WeightSource, region: np.ndarray) -> None:
    """Put the file's pages at the address of `region`, uint8 [size_bytes] at the start of a huge page; private, never written back.

    Raises:
        ConfigError: the system refuses.
    """
    address = region.ctypes.data
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
    if _libc.mmap(address, source.size_bytes, protection, flags, source.fd, 0) == _FAILED:
        raise ConfigError(f"{source.path} cannot be mapped: {os.strerror(ctypes.get_errno())}; leave --early-start out")
    _libc.madvise(address, source.size_bytes, mmap.MADV_HUGEPAGE)  # a hint; where the page cache has large pages, these are mapped
    _libc.madvise(address, source.size_bytes, mmap.MADV_WILLNEED)


def populate(chunk: np.ndarray) -> None:
    """Read a mapped chunk in at once rather than fault by fault; a kernel before 5.14 faults."""
    start = chunk.ctypes.data & ~(mmap.PAGESIZE - 1)
    _libc.madvise(start, chunk.ctypes.data + chunk.nbytes - start, _MADV_POPULATE_READ)


class WeightMover:
    """Moves mapped weights, once. `start` begins, `close` stops and waits; `check` is asked before every step.

    Args:
        sources: the files, their chunks verified already where they are to be.
        regions: uint8 [size_bytes] for each, where `map_over` put it.
    """

    def __init__(self, sources: Sequence[WeightSource], regions: Sequence[np.ndarray]) -> None:
        self._tasks = [
            (source, index, region) for source, region in zip(sources, regions, strict=True) for index in range(source.num_chunks)
        ]
        self._pending_bytes = sum(source.size_bytes for source in sources)
        self._stop = threading.Event()
        self._begin = threading.Event()
        self._steps = 0
        self._thread: threading.Thread | None = None
        self._fault: Exception | None = None

    @property
    def pending_bytes(self) -> int:
        """Memory that is still to be taken."""
        return self._pending_bytes

    def start(self, *, head_start_s: float = 0.0) -> None:
        """Move in a thread of its own.

        Args:
            head_start_s: seconds to stand back for the first step, which somebody may be waiting for; less when a second one comes.
        """
        self._steps = 0
        self._begin.clear()
        self._thread = threading.Thread(target=self._run, args=(head_start_s,), name="llmc-weights", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises DeviceLost if the weights are no longer what was verified, or there is no memory for them."""
        self._steps += 1
        if self._steps == 2:  # the first answer is out
            self._begin.set()
        if self._fault is not None:
            raise DeviceLost(f"the weights could not move into memory: {self._fault}") from self._fault

    def wait(self) -> None:
        """Until everything has moved, or failed."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Stop behind the chunk that is on its way."""
        self._stop.set()
        self._begin.set()
        self.wait()

    def _run(self, head_start_s: float) -> None:
        self._begin.wait(head_start_s)
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)  # of this thread alone
            for source, index, region in self._tasks:
                if self._stop.is_set():
                    return
                start, nbytes = source.chunk_span(index)
                move(source, index, region[start : start + nbytes])
                self._pending_bytes -= nbytes
        except Exception as error:  # told to the thread that computes, at its next step
            self._fault = error


def move(source: WeightSource, index: int, chunk: np.ndarray) -> None:
    """Copy a mapped chunk into huge pages, verify the copy and put it in the chunk's place. Others may read the chunk meanwhile.

    Args:
        chunk: uint8, at the start of a huge page; up to the end of its last huge page nothing else may lie.

    Raises:
        ArtifactError: the copy is not what was verified, since the file was changed.
        ConfigError: no memory.
    """
    nbytes = round_up(chunk.nbytes, HUGE_PAGE_BYTES)
    staging = _Staging(nbytes)
    try:
        np.copyto(staging.array[: chunk.nbytes], chunk)
        if source.must_verify:
            source.verify_chunk(index, staging.array[: chunk.nbytes].data)
        staging.put(chunk.ctypes.data)
    finally:
        staging.close()


class _Staging:
    """Memory whose huge pages can be put elsewhere. array: uint8 [nbytes], until then."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._base = int(_libc.mmap(None, nbytes + HUGE_PAGE_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0))
        if self._base == _FAILED:
            raise ConfigError(f"no memory for {nbytes} bytes of weights: {os.strerror(ctypes.get_errno())}")
        self._left = [(self._base, nbytes + HUGE_PAGE_BYTES)]
        self._start = round_up(self._base, HUGE_PAGE_BYTES)
        _libc.madvise(self._start, nbytes, mmap.MADV_HUGEPAGE)
        self.array = np.ctypeslib.as_array(ctypes.cast(self._start, ctypes.POINTER(ctypes.c_uint8)), (nbytes,))

    def put(self, address: int) -> None:
        """Move the pages to `address`, in the place of what is there. Their old place belongs to the system from then on."""
        if _libc.mremap(self._start, self._nbytes, self._nbytes, _MREMAP_MAYMOVE | _MREMAP_FIXED, address) == _FAILED:
            raise ConfigError(f"the system does not move {self._nbytes} bytes of weights: {os.strerror(ctypes.get_errno())}")
        self._left = [(self._base, self._start - self._base), (self._start + self._nbytes, self._base + HUGE_PAGE_BYTES - self._start)]

    def close(self) -> None:
        """Unmap what is still here."""
        for start, nbytes in self._left:
            if nbytes:
                _libc.munmap(start, nbytes)
        self._left = []
