"""The compile cache: /ac/<key> says what a compile gave, /cas/<digest> holds the files, each once.

    root/ac/<2 hex>/<key>.json      a Record: the key's parts, a description, the files with their digests
    root/cas/<2 hex>/<digest>       a file's bytes, read-only; hard-linked into artifacts where that is possible
    root/stamps/                    files hashed before (stamps.py)
    root/locks/<key>                held while a key is being compiled, so that two compiles of it do the work once

The folder is private (0700): what is in it becomes machine code. Every file is hashed before it is handed out, unless it is
large and its stamp says that it is unchanged; what does not match is deleted and counts as a miss. The size is bounded: least
recently used entries go first, never one that somebody is reading (he holds the store's lock shared, collecting needs it alone).
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
import msgspec

from llmc.artifacts.filesystem import OS, FileSystem, explain_os_error, remove_tree, sync_folder, write_all
from llmc.artifacts.keys import Key, PartDifference, explain
from llmc.artifacts.manifest import FileRecord
from llmc.artifacts.manifest_json import decode_manifest
from llmc.artifacts.received import take_in
from llmc.artifacts.relative_paths import MANIFEST_NAME
from llmc.artifacts.stamps import StampFolder, cache_root, make_private_folder
from llmc.artifacts.stored_files import (
    MAX_RECORD_BYTES,
    SHA256,
    Record,
    StoredFile,
    chunked_files,
    decode_record,
    digest_of,
    files_below,
    stamp_text,
    total_bytes,
)
from llmc.artifacts.weight_file import copy_into
from llmc.artifacts.writer import ArtifactWriter, Published
from llmc.errors import ArtifactError, InternalError

__all__ = ["Collected", "Listed", "Record", "Store"]

DEFAULT_MAX_BYTES = 20 << 30
_STAMPED_BYTES = 8 << 20  # smaller files are always hashed: code above all
_GRACE_NS = 3600 * 10**9  # an unfinished temporary file of a killed process is deleted after an hour


@dataclass(frozen=True, kw_only=True)
class Listed:
    """An entry as `llmc cache ls` shows it."""

    record: Record
    size_bytes: int
    used_at: float  # seconds since the epoch


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a collection did."""

    removed_entries: int
    freed_bytes: int
    kept_bytes: int


class Store:
    """The local compile cache. Any number of processes may use it at once."""

    def __init__(self, root: Path | None = None, max_bytes: int = DEFAULT_MAX_BYTES, *, fs: FileSystem = OS) -> None:
        """
        Args:
            root: the folder; by default LLMC_CACHE_DIR or the user's cache folder.
            max_bytes: what all files together may take after a `put`.

        Raises:
            ConfigError: the folder is not ours alone, or cannot be made.
        """
        self.root = (root if root is not None else cache_root()).absolute()
        self.max_bytes = max_bytes
        self.stamps = StampFolder(self.root / "stamps")
        self._fs = fs
        for folder in (self.root, self.root / "ac", self.root / "cas", self.root / "locks", self.root / "stamps"):
            make_private_folder(folder)

    def find(self, key: Key | str) -> Record | None:
        """The entry of a key, or None. Looks at the record alone, changes nothing."""
        if not SHA256.fullmatch(str(key)):
            return None
        try:
            with open(self._record_path(str(key)), "rb") as file:
                return decode_record(file.read(MAX_RECORD_BYTES), str(key))
        except (FileNotFoundError, ArtifactError):
            return None

    def put(self, key: Key, folder: Path, description: Mapping[str, str | int | float | bool | None]) -> bool:
        """Keep a folder under a key: an artifact just published, or lowered code. Its files are linked in where possible.

        Returns:
            Whether it was kept; a folder larger than the whole cache is not. An entry of this key is replaced.

        Raises:
            ArtifactError: the system could not read or write; the cache holds then what it held before.
        """
        chunked = chunked_files(folder)
        try:
            with self._locked(fcntl.LOCK_SH):
                files = [self._take_in(folder, path, chunked.get(path)) for path in files_below(folder)]
                if sum(stored.size_bytes for stored in files) > self.max_bytes:
                    kept = False
                else:
                    record = Record(kind=key.kind, key=key.digest, parts=dict(key.parts), description=dict(description), files=files)
                    self._write(self._record_path(key.digest), msgspec.json.encode(record, order="sorted"))
                    self._stamp_again(record)
                    kept = True
        except OSError as error:
            raise explain_os_error(error, "keeping a result in the cache", str(self.root)) from error
        self.collect()
        return kept

    def fetch(self, key: Key | str, into: Path) -> bool:
        """Put an entry's files into a new folder, for the compiler's own use (lowered code).

        Returns:
            Whether the key was there and whole; if not, `into` does not exist.
        """
        with self._locked(fcntl.LOCK_SH):
            record = self._checked(key)
            if record is None:
                return False
            try:
                into.mkdir(mode=0o700, parents=True)
                for stored in record.files:
                    target = into / stored.path
                    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    fd = self._fs.create(str(target))
                    try:
                        self._copy_blob(stored, fd)
                    finally:
                        os.close(fd)
            except OSError as error:
                remove_tree(self._fs, str(into))
                raise explain_os_error(error, "copying from the cache", str(into), needed_bytes=total_bytes(record)) from error
        return True

    def place(self, key: Key | str, out: Path, *, force: bool = False) -> Published | None:
        """Publish a cached artifact as `out`, with all guarantees of `ArtifactWriter`.

        Returns:
            What happened to `out`, or None if the key is not in the cache or was damaged there.

        Raises:
            ConfigError: something else is at `out`, and `force` is off or does not allow it.
        """
        with self._locked(fcntl.LOCK_SH):
            record = self._checked(key)
            if record is None:
                return None
            names = {stored.path: stored for stored in record.files}
            if MANIFEST_NAME not in names:
                raise InternalError(f"cache entry {record.key} is not an artifact; please report this")
            manifest_bytes = self._blob(names[MANIFEST_NAME]).read_bytes()
            with ArtifactWriter(out, force=force, fs=self._fs) as writer:
                for file in decode_manifest(manifest_bytes, f"{self.root}: {record.key}").files:
                    writer.adopt_file(file, self._blob(names[file.path]), link=True)
                result = writer.publish(manifest_bytes)
            self._stamp_again(record)
        return result

    @contextmanager
    def lock(self, key: Key | str) -> Iterator[None]:
        """Hold the lock of a key, so that of several compiles of one input the first works and the others find its result.

        Only saves work: results are right without it.
        """
        with filelock.FileLock(self.root / "locks" / str(key)):
            yield

    def nearest(self, key: Key) -> tuple[Record, list[PartDifference]] | None:
        """For a miss: the entry of the same kind that differs in the fewest parts, newest first, and where it differs."""
        same = [listed for listed in self.entries() if listed.record.kind == key.kind and listed.record.key != key.digest]
        best = min(same, key=lambda e: (len(explain(e.record.parts, key.parts)), -e.used_at), default=None)
        return None if best is None else (best.record, explain(best.record.parts, key.parts))

    def entries(self) -> list[Listed]:
        """Every entry, most recently used first."""
        found = []
        for path in sorted(self.root.glob("ac/*/*.json")):
            record = self.find(path.stem)
            try:
                used = path.stat().st_mtime
            except FileNotFoundError:
                continue
            if record is not None:
                found.append(Listed(record=record, size_bytes=total_bytes(record), used_at=used))
        return sorted(found, key=lambda listed: -listed.used_at)

    def collect(self, max_bytes: int | None = None) -> Collected:
        """Remove least recently used entries until the rest fits, then files no entry names.

        Does nothing while somebody else reads from or writes to the cache: the next `put` collects.
        """
        limit = self.max_bytes if max_bytes is None else max_bytes
        with self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
            if not alone:
                return Collected(removed_entries=0, freed_bytes=0, kept_bytes=-1)
            kept: dict[str, int] = {}
            removed = 0
            for listed in self.entries():
                added = {stored.digest: stored.size_bytes for stored in listed.record.files if stored.digest not in kept}
                if sum(kept.values()) + sum(added.values()) <= limit:
                    kept |= added
                else:
                    self._record_path(listed.record.key).unlink(missing_ok=True)
                    removed += 1
            return Collected(removed_entries=removed, freed_bytes=self._sweep(set(kept)), kept_bytes=sum(kept.values()))

    def holds(self, stored: StoredFile, *, stamps: bool = True) -> bool:
        """Whether a file is here and whole. A damaged one is deleted.

        Args:
            stamps: believe the stamp of a large file; False hashes every byte.
        """
        return self._is_whole(stored, stamps=stamps)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Nothing is collected inside the `with`."""
        with self._locked(fcntl.LOCK_SH):
            yield

    def path_of(self, stored: StoredFile) -> Path:
        """Where a file that `holds` lies; it may be collected unless `reading`."""
        return self._blob(stored)

    def receive(self, stored: StoredFile, pieces: Iterable[bytes]) -> None:
        """Take in a file from elsewhere; it appears whole, or not at all.

        Raises:
            ArtifactError: it is longer or shorter than `stored` says, or hashes to something else, or the system could not write.
        """
        self._received(stored, pieces, keep=True)

    def examine(self, stored: StoredFile, pieces: Iterable[bytes]) -> None:
        """As `receive`, and forget it again."""
        self._received(stored, pieces, keep=False)

    def _received(self, stored: StoredFile, pieces: Iterable[bytes], *, keep: bool) -> None:
        target = self._blob(stored)
        make_private_folder(target.parent)
        take_in(self._fs, stored, pieces, target, keep=keep)

    def keep(self, record: Record) -> None:
        """Enter a record all of whose files are here. An entry of this key is replaced.

        Raises:
            InternalError: a file is not here.
        """
        missing = [stored.path for stored in record.files if not self._is_whole(stored)]
        if missing:
            raise InternalError(f"cache entry {record.key} lacks {missing[0]}; please report this")
        self._write(self._record_path(record.key), msgspec.json.encode(record, order="sorted"))

    def remove(self, key: Key | str) -> None:
        """Forget an entry; its files go with the next collection."""
        self._record_path(str(key)).unlink(missing_ok=True)

    def _sweep(self, kept: set[str]) -> int:
        """Delete files no entry names, and temporary files of killed processes. Returns the bytes freed."""
        freed = 0
        for path in [*self.root.glob("cas/*/*"), *self.root.glob("ac/*/.*")]:
            info = path.stat()
            young = time.time_ns() - info.st_mtime_ns < _GRACE_NS
            if path.name in kept or (path.name.startswith(".") and young):
                continue
            path.unlink(missing_ok=True)
            freed += info.st_size
        return freed

    def _checked(self, key: Key | str) -> Record | None:
        """The entry of a key if every file is there and hashes to its digest; a damaged entry is deleted. Marks it as used."""
        record = self.find(key)
        if record is None:
            return None
        if not all(self._is_whole(stored) for stored in record.files):
            self.remove(key)
            return None
        os.utime(self._record_path(str(key)))
        return record

    def _is_whole(self, stored: StoredFile, *, stamps: bool = True) -> bool:
        path = self._blob(stored)
        try:
            with open(path, "rb", buffering=0) as file:
                before = os.fstat(file.fileno())
                if before.st_size != stored.size_bytes:
                    path.unlink(missing_ok=True)
                    return False
                if stamps and stored.size_bytes >= _STAMPED_BYTES and self.stamps.find(before) == stamp_text(stored):
                    return True
                found = digest_of(file.fileno(), stored.chunk_bytes)
                if found != stored.digest:
                    path.unlink(missing_ok=True)
                    return False
                self.stamps.remember(before, os.fstat(file.fileno()), stamp_text(stored))
        except FileNotFoundError:
            return False
        return True

    def _take_in(self, folder: Path, path: str, record: tuple[FileRecord, int] | None) -> StoredFile:
        """Bring one file into cas, by link or copy, hashed in any case. Files already there are left alone."""
        source = folder / path
        chunk_bytes = record[1] if record is not None else 0
        fd = self._fs.open_source(str(source))
        try:
            before = os.fstat(fd)
            digest = digest_of(fd, chunk_bytes)
        finally:
            os.close(fd)
        stored = StoredFile(path=path, size_bytes=before.st_size, digest=digest, chunk_bytes=chunk_bytes)
        if record is not None and digest != record[0].sha256:
            raise ArtifactError(f"{source}: changed after it was written; compile again")
        if self._is_whole(stored):
            return stored
        target = self._blob(stored)
        make_private_folder(target.parent)
        temporary = f"{target.parent}/.{secrets.token_hex(12)}"
        try:
            self._fs.link(str(source), temporary)
        except OSError:
            self._copy_file(source, temporary)  # another file system, no hard links, or too many: the copy fails where the link had to
        self._fs.rename(temporary, str(target))
        return stored

    def _copy_file(self, source: Path, target: str) -> None:
        fd = self._fs.open_source(str(source))
        try:
            out = self._fs.create(target)
            try:
                copy_into(self._fs, fd, out, lambda piece: None)
                self._fs.fsync(out)
            except OSError:
                self._fs.unlink(target)
                raise
            finally:
                os.close(out)
        finally:
            os.close(fd)

    def _copy_blob(self, stored: StoredFile, fd: int) -> None:
        source = self._fs.open_source(str(self._blob(stored)))
        try:
            copy_into(self._fs, source, fd, lambda piece: None)
        finally:
            os.close(source)

    def _stamp_again(self, record: Record) -> None:
        """Linking a file changed its change time: stamp large files anew, so that the next hit need not hash them.

        They were checked in this call, under the lock; only their number of links has changed since. The stamp must be older than
        the clock's tick to be kept (stamps.py), hence the wait.
        """
        large = [stored for stored in record.files if stored.size_bytes >= _STAMPED_BYTES]
        if not large:
            return
        time.sleep(0.06)
        for stored in large:
            info = os.stat(self._blob(stored))
            self.stamps.remember(info, info, stamp_text(stored))

    def _write(self, path: Path, data: bytes) -> None:
        """Write a small file in one step."""
        make_private_folder(path.parent)
        temporary = f"{path.parent}/.{secrets.token_hex(12)}"
        fd = self._fs.create(temporary)
        try:
            write_all(self._fs, fd, data)
            self._fs.fsync(fd)
            self._fs.rename(temporary, str(path))
        except OSError:
            self._fs.unlink(temporary)
            raise
        finally:
            os.close(fd)
        sync_folder(self._fs, str(path.parent))

    @contextmanager
    def _locked(self, how: int) -> Iterator[bool]:
        """Hold the store's lock; gives False if it was asked for without waiting and somebody else has it."""
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, how)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(fd)

    def _record_path(self, key: str) -> Path:
        return self.root / "ac" / key[:2] / f"{key}.json"

    def _blob(self, stored: StoredFile) -> Path:
        return self.root / "cas" / stored.digest[:2] / stored.digest
