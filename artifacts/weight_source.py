"""Reading a weight file while hashing it, chunk by chunk, from as many threads as the caller likes.

for source in artifact.weights(verify="always"):
    for i in range(source.num_chunks):          # or a thread pool over i
        offset, nbytes = source.chunk_span(i)
        source.read_chunk(i, region[offset : offset + nbytes])
    source.finish()                             # no token may leave before this returned
"""

from __future__ import annotations

import os
from typing import Literal

from llmc.artifacts.chunks import digest_of_chunks, sha256_hex
from llmc.artifacts.manifest import WeightFile
from llmc.artifacts.stamps import StampFolder
from llmc.errors import ArtifactError, InternalError

VerifyMode = Literal["always", "once", "never"]


class WeightSource:
    """One open weight file. Its descriptor belongs to the OpenArtifact it came from.

    Attributes:
        path: the file's name inside the artifact.
        record: its entry in the manifest, with the chunk digests.
        fd: open for reading; its size has been checked.
        size_bytes, chunk_bytes, num_chunks: chunks tile the file, the last may be short.
        must_verify: whether chunks are hashed; False for mode "never", and for "once" with a valid stamp.
        why: one line for the start-up table.
    """

    def __init__(self, record: WeightFile, fd: int, where: str, mode: VerifyMode, stamps: StampFolder | None) -> None:
        self.path = record.path
        self.fd = fd
        self.size_bytes = record.size_bytes
        self.chunk_bytes = record.chunk_bytes
        self.num_chunks = len(record.chunks)
        self.record = record
        self._where = where
        self._stamps = stamps if mode == "once" else None
        self._before = os.fstat(fd)
        self._verified = bytearray(self.num_chunks)  # one byte per chunk: threads write different bytes
        self._stamp_digest = f"chunks:{record.chunk_bytes}:{digest_of_chunks(record.chunks)}"
        stamped = self._stamps is not None and self._stamps.find(self._before) == self._stamp_digest
        self.must_verify = mode != "never" and not stamped
        if self.must_verify:
            self.why = "every chunk is hashed"
        else:
            self.why = "unchanged since it was last hashed here" if stamped else "not verified (--verify-weights never)"

    def chunk_span(self, index: int) -> tuple[int, int]:
        """Offset in the file and number of bytes of a chunk."""
        offset = index * self.chunk_bytes
        return offset, min(self.chunk_bytes, self.size_bytes - offset)

    def read_chunk(self, index: int, buffer: memoryview) -> None:
        """Read a chunk into a buffer of exactly its size, and verify it there if this source must.

        Raises:
            ArtifactError: the file ended early, could not be read, or the chunk's hash differs.
        """
        offset, nbytes = self.chunk_span(index)
        view = buffer.cast("B")
        if len(view) != nbytes:
            raise InternalError(f"chunk {index} of {self.path} has {nbytes} bytes, the buffer {len(view)}; please report this")
        done = 0
        while done < nbytes:
            try:
                got = os.preadv(self.fd, [view[done:]], offset + done)
            except OSError as error:
                raise ArtifactError(f"{self._where}: reading at byte {offset + done} failed: {os.strerror(error.errno or 0)}") from error
            if got == 0:
                raise ArtifactError(f"{self._where}: ends at byte {offset + done}, expected {self.size_bytes} bytes; fetch it again")
            done += got
        if self.must_verify:
            self.verify_chunk(index, view)

    def verify_chunk(self, index: int, buffer: memoryview) -> None:
        """Hash a chunk that was copied by other means (releases the interpreter lock while hashing).

        Raises:
            ArtifactError: the bytes are not the chunk's.
        """
        found = sha256_hex(buffer)
        if found != self.record.chunks[index]:
            offset, nbytes = self.chunk_span(index)
            raise ArtifactError(
                f"{self._where}: bytes {offset} to {offset + nbytes} are damaged, expected SHA-256 {self.record.chunks[index]}, "
                f"found {found}; fetch the artifact again or compile again"
            )
        self._verified[index] = 1

    def accept_chunk(self, index: int, digest: str, buffer: memoryview) -> None:
        """Verify a chunk whose SHA-256 was computed by other means than hashlib. One that differs is hashed again, as `verify_chunk` does.

        Args:
            digest: lower-case hex.
            buffer: the chunk.

        Raises:
            ArtifactError: the bytes are not the chunk's.
        """
        if digest == self.record.chunks[index]:
            self._verified[index] = 1
        else:
            self.verify_chunk(index, buffer)

    def finish(self) -> None:
        """Declare the file read. For mode "once", remember that it was hashed.

        Raises:
            InternalError: a chunk that had to be verified was not.
        """
        if not self.must_verify:
            return
        if not all(self._verified):
            raise InternalError(f"{self._where}: chunk {self._verified.index(0)} was never verified; please report this")
        self.remember()

    def remember(self) -> None:
        """Leave a stamp, for mode "once". For callers that hashed every chunk against `record` themselves, and only after they did."""
        if self._stamps is not None:
            self._stamps.remember(self._before, os.fstat(self.fd), self._stamp_digest)
