"""A file that comes from elsewhere, piece by piece: written beside its place, measured, hashed, and only then given its name."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from llmc.artifacts.filesystem import FileSystem, explain_os_error, write_all
from llmc.artifacts.stored_files import StoredFile, digest_of
from llmc.errors import ArtifactError


def take_in(fs: FileSystem, stored: StoredFile, pieces: Iterable[bytes], target: Path, *, keep: bool) -> None:
    """Write `pieces` to `target`, whose folder exists; it appears whole, or not at all.

    Args:
        keep: False: check it and forget it again.

    Raises:
        ArtifactError: it is longer or shorter than `stored` says, or hashes to something else, or the system could not write.
    """
    temporary = f"{target.parent}/.{secrets.token_hex(12)}"
    try:
        fd = fs.create(temporary)
        try:
            _write(fs, stored, pieces, fd)
            fs.fsync(fd)
            _check_digest(fs, stored, temporary)
            if keep:
                fs.rename(temporary, str(target))
            else:
                fs.unlink(temporary)
        except BaseException:
            fs.unlink(temporary)
            raise
        finally:
            os.close(fd)
    except OSError as error:
        raise explain_os_error(error, "taking a file into the cache", str(target), needed_bytes=stored.size_bytes) from error


def _write(fs: FileSystem, stored: StoredFile, pieces: Iterable[bytes], fd: int) -> None:
    received = 0
    for piece in pieces:
        received += len(piece)
        if received > stored.size_bytes:
            raise ArtifactError(f"{stored.path}: is longer than the {stored.size_bytes} bytes its entry says")
        write_all(fs, fd, piece)
    if received < stored.size_bytes:
        raise ArtifactError(f"{stored.path}: ends after {received} of {stored.size_bytes} bytes")


def _check_digest(fs: FileSystem, stored: StoredFile, path: str) -> None:
    fd = fs.open_source(path)
    try:
        if digest_of(fd, stored.chunk_bytes) != stored.digest:
            raise ArtifactError(f"{stored.path}: hashes to something else than its entry says")
    finally:
        os.close(fd)
