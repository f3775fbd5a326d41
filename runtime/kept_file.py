"""A file of the artifact that may be needed long after its start, whatever has become of the folder meanwhile."""

from __future__ import annotations

import hashlib
import os

from llmc.errors import ArtifactError


class KeptFile:
    """An open file whose content is known. Costs a descriptor, no memory.

    Args:
        fd: the verified, open file; duplicated here.
        size_bytes: its size.
        sha256: its hash, in hexadecimal, from the manifest.
        name: for messages.
    """

    def __init__(self, fd: int, *, size_bytes: int, sha256: str, name: str) -> None:
        self._fd = os.dup(fd)
        self._size_bytes = size_bytes
        self._sha256 = sha256
        self._name = name

    def read(self) -> bytes:
        """Its bytes, hashed once more.

        Raises:
            ArtifactError: somebody changed them since the start.
        """
        data = bytearray()
        while len(data) < self._size_bytes and (piece := os.pread(self._fd, self._size_bytes - len(data), len(data))):
            data += piece
        if hashlib.sha256(data).hexdigest() != self._sha256:
            raise ArtifactError(f"{self._name}: changed while it was in use; restart with an artifact nobody writes to")
        return bytes(data)

    def close(self) -> None:
        """Close it. Doing it twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
