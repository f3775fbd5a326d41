"""Hashing a file in chunks of 16 MiB, so that it can be written in one go and checked by several threads at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

CHUNK_BYTES = 16 * 1024 * 1024


def sha256_hex(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_of_chunks(chunks: Iterable[str]) -> str:
    """The file record's digest of a chunked file: SHA-256 over the raw chunk digests one after another, as hex."""
    return hashlib.sha256(b"".join(bytes.fromhex(chunk) for chunk in chunks)).hexdigest()


class ChunkHasher:
    """Takes a file's bytes in order and keeps one SHA-256 per chunk; the last chunk may be short."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes
        self.size_bytes = 0
        self._done: list[str] = []
        self._current = hashlib.sha256()

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes, any number of them."""
        view = memoryview(data).cast("B")
        while len(view):
            room = self.chunk_bytes - self.size_bytes % self.chunk_bytes
            part = view[:room]
            self._current.update(part)
            self.size_bytes += len(part)
            view = view[len(part) :]
            if self.size_bytes % self.chunk_bytes == 0:
                self._done.append(self._current.hexdigest())
                self._current = hashlib.sha256()

    def chunks(self) -> list[str]:
        """The digests of all chunks so far, the unfinished one included."""
        if self.size_bytes % self.chunk_bytes:
            return [*self._done, self._current.hexdigest()]
        return list(self._done)
