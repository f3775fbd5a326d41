"""SHA-256 of several buffers at once, by the kernels image of the artifact whose weights are hashed.

hashlib takes one buffer after another, 1.1 GB/s a thread; buffers side by side in a vector register come to 3.7. The image was itself
hashed, by hashlib, before it was mapped (artifacts/verify.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from llmc.errors import InternalError

_DIGEST_BYTES = 32
_OK, _NO_HARDWARE = 0, 5  # llmc_types.h


class _Args(ctypes.Structure):
    """LlmcSha256Args of kernels/sha256/cpu/sha256.h."""

    _fields_: ClassVar = [
        ("struct_bytes", ctypes.c_int64),
        ("messages", ctypes.POINTER(ctypes.c_void_p)),
        ("digests", ctypes.POINTER(ctypes.c_uint8)),
        ("num_messages", ctypes.c_int64),
        ("message_bytes", ctypes.c_int64),
    ]


class LaneHash:
    """Hashes up to `LANES` buffers of one length in the time of five. Releases the interpreter lock; any thread may call."""

    LANES = 16

    def __init__(self, kernels: ctypes.CDLL) -> None:
        self._function = kernels.llmc_sha256

    @classmethod
    def of(cls, kernels: ctypes.CDLL) -> LaneHash | None:
        """The image's, or None: it was compiled before there was one, or for a level without AVX-512."""
        if not hasattr(kernels, "llmc_sha256"):
            return None
        found = cls(kernels)
        status, _ = found._call([np.zeros(0, dtype=np.uint8)])
        return None if status == _NO_HARDWARE else found

    def __call__(self, buffers: Sequence[np.ndarray]) -> list[str]:
        """The digest of each, in hex. buffers: 1 to `LANES`, uint8, contiguous, of one length."""
        status, digests = self._call(buffers)
        if status != _OK:
            raise InternalError(f"hashing {len(buffers)} buffers failed with status {status}; please report this")
        return [digests[at : at + _DIGEST_BYTES].hex() for at in range(0, len(digests), _DIGEST_BYTES)]

    def _call(self, buffers: Sequence[np.ndarray]) -> tuple[int, bytes]:
        assert len({buffer.nbytes for buffer in buffers}) == 1, "lanes are of one length"
        addresses = (ctypes.c_void_p * len(buffers))(*(buffer.ctypes.data for buffer in buffers))
        digests = (ctypes.c_uint8 * (_DIGEST_BYTES * len(buffers)))()
        args = _Args(ctypes.sizeof(_Args), addresses, digests, len(buffers), buffers[0].nbytes)
        return int(self._function(ctypes.byref(args))), bytes(digests)
