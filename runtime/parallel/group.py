"""The memory that the ranks of one model share, through which their sums go (kernels/all_reduce)."""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np

from llmc.errors import ArtifactError, InternalError

_MAPPED: list[np.ndarray] = []  # for the life of the process: the kernels keep the address


class Group:
    """One rank's hold on the group. The kernels must be loaded first, with their names open to all.

    Args:
        fd: of the shared memory; None makes it (rank 0).
    """

    def __init__(self, rank: int, ranks: int, fd: int | None = None) -> None:
        kernels = ctypes.CDLL(None)
        try:
            self._abort = kernels.llmc_all_reduce_abort
            num_bytes, join = kernels.llmc_all_reduce_bytes, kernels.llmc_all_reduce_join
        except AttributeError:
            raise ArtifactError("the artifact's kernels have no all_reduce, which its program needs; compile it again") from None
        num_bytes.argtypes, num_bytes.restype = [ctypes.c_int64], ctypes.c_int64
        join.argtypes, join.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64], ctypes.c_int32
        self._abort.argtypes, self._abort.restype = [ctypes.c_void_p], None
        size = num_bytes(ranks)
        if fd is None:
            fd = os.memfd_create("llmc-all-reduce")  # close-on-exec: handed on by name of its descriptor
            os.ftruncate(fd, size)
        self.fd = fd
        self._memory = np.frombuffer(mmap.mmap(fd, size), dtype=np.uint8)
        _MAPPED.append(self._memory)
        if code := join(self._memory.ctypes.data, size, rank, ranks):
            raise InternalError(f"rank {rank} of {ranks} could not join its group: code {code}; please report this")

    def abort(self) -> None:
        """End every wait of every rank with an error: one of them is gone."""
        self._abort(self._memory.ctypes.data)
