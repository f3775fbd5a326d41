"""What the cache knows of a file and of an entry, and how a file is hashed for it."""

from __future__ import annotations

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from llmc.artifacts.chunks import digest_of_chunks
from llmc.artifacts.manifest import FileRecord
from llmc.artifacts.manifest_json import decode_manifest
from llmc.artifacts.relative_paths import MANIFEST_NAME, SIGNATURE_NAME, check_relative_path
from llmc.errors import ArtifactError

SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
MAX_RECORD_BYTES = 64 << 20


class StoredFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of an entry."""

    path: str
    size_bytes: int
    digest: str  # SHA-256; with chunk_bytes that of the chunk digests, as in FileRecord
    chunk_bytes: int = 0


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the action cache."""

    kind: str
    key: str
    parts: dict[str, str]
    description: dict[str, str | int | float | bool | None]
    files: list[StoredFile]


def decode_record(data: bytes, key: str) -> Record:
    """Read a record, believing nothing.

    Raises:
        ArtifactError: it is no record of `key`, or names a file outside its folder, or a digest that is none.
    """
    try:
        record = msgspec.json.decode(data, type=Record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"cache entry {key}: is no record of a cache: {error}") from error
    if record.key != key:
        raise ArtifactError(f"cache entry {key}: is the record of {record.key[:80]!r}")
    for stored in record.files:
        if stored.path != MANIFEST_NAME:
            check_relative_path(stored.path, "cache")
        if not SHA256.fullmatch(stored.digest) or stored.size_bytes < 0 or stored.chunk_bytes < 0:
            raise ArtifactError(f"cache entry {key}: {stored.path!r} has no SHA-256 or no size")
    if len({stored.path for stored in record.files}) != len(record.files):
        raise ArtifactError(f"cache entry {key}: names a file twice")
    return record


def digest_of(fd: int, chunk_bytes: int) -> str:
    """SHA-256 of an open file, or of its chunk digests."""
    if not chunk_bytes:
        return _span_sha256(fd, 0, os.fstat(fd).st_size)
    starts = range(0, os.fstat(fd).st_size, chunk_bytes)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return digest_of_chunks(pool.map(lambda start: _span_sha256(fd, start, chunk_bytes), starts))


def _span_sha256(fd: int, start: int, size: int) -> str:
    """SHA-256 of [start, start + size) of an open file, or of what there is of it."""
    hasher = hashlib.sha256()
    end = start + size
    while start < end and (piece := os.pread(fd, min(1 << 20, end - start), start)):
        hasher.update(piece)
        start += len(piece)
    return hasher.hexdigest()


def stamp_text(stored: StoredFile) -> str:
    return f"chunks:{stored.chunk_bytes}:{stored.digest}" if stored.chunk_bytes else f"sha256:{stored.digest}"


def total_bytes(record: Record) -> int:
    return sum(stored.size_bytes for stored in record.files)


def files_below(folder: Path) -> list[str]:
    """Every regular file below a folder, as relative names. Signatures stay out: they belong to one copy of an artifact."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not path.is_file() or name == SIGNATURE_NAME:
            continue
        if name != MANIFEST_NAME:
            check_relative_path(name, str(folder))
        found.append(name)
    return found


def chunked_files(folder: Path) -> dict[str, tuple[FileRecord, int]]:
    """The weight files of an artifact folder with their chunk size; none if the folder is no artifact."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return {}
    manifest = decode_manifest(path.read_bytes(), str(path))
    records = {record.path: record for record in manifest.files}
    return {weight.path: (records[weight.path], weight.chunk_bytes) for weight in manifest.weights}
