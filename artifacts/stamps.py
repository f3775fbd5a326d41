"""Remembering that a file was hashed: device, inode, size, mtime_ns and ctime_ns against its digest, in a private folder.

The change time cannot be set by users, so a file whose five numbers are unchanged has not been written to. One gap: two
changes within one tick of the file system's clock look alike. So nothing younger than `MIN_AGE_NS` is remembered.
"""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import msgspec

from llmc.artifacts.chunks import sha256_hex
from llmc.errors import ConfigError

MIN_AGE_NS = 50_000_000  # Linux file systems tick every 1 to 10 ms
_MAX_STAMP_BYTES = 4096


class Stamp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file's identity at the moment it was hashed."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    digest: str  # with its kind: "sha256:..." or "chunks:<chunk_bytes>:..."


def cache_root() -> Path:
    """LLMC_CACHE_DIR, or the user's cache folder."""
    named = os.environ.get("LLMC_CACHE_DIR")
    if named:
        return Path(named).absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("llmc", appauthor=False))


def make_private_folder(path: Path) -> None:
    """Make a folder only we may enter, or check that it is one.

    Raises:
        ConfigError: it belongs to somebody else, is open to others, or cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = os.stat(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be used as a cache folder ({os.strerror(error.errno or 0)}); set LLMC_CACHE_DIR") from error
    if info.st_uid != os.geteuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{path}: a cache folder must be yours and writable by you alone; chmod go-w it or set LLMC_CACHE_DIR")


class StampFolder:
    """Stamps on disk, one small file each, under `root`. Losing one costs a hash; believing a wrong one is what must not happen."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else cache_root() / "stamps"

    def find(self, info: os.stat_result) -> str | None:
        """The digest remembered for a file in exactly this state, or None. Changes nothing."""
        try:
            make_private_folder(self.root)
            with open(self._path(info), "rb") as file:
                stamp = msgspec.json.decode(file.read(_MAX_STAMP_BYTES), type=Stamp)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        return stamp.digest if stamp == _stamp(info, stamp.digest) else None

    def remember(self, before: os.stat_result, after: os.stat_result, digest: str) -> bool:
        """Keep a digest, if the file stood still from `before` hashing to `after` and is old enough.

        Returns:
            Whether it was kept. A full disk is no error here: it costs a hash next time.
        """
        same = _stamp(before, digest) == _stamp(after, digest)
        if not same or time.time_ns() - max(before.st_ctime_ns, before.st_mtime_ns) < MIN_AGE_NS:
            return False
        make_private_folder(self.root)
        path = self._path(after)
        temporary = f"{path}.{os.getpid()}.{time.monotonic_ns()}"
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            with open(temporary, "xb") as file:
                file.write(msgspec.json.encode(_stamp(after, digest)))
            os.replace(temporary, path)
        except OSError:
            return False
        return True

    def _path(self, info: os.stat_result) -> Path:
        name = sha256_hex(f"{info.st_dev}:{info.st_ino}".encode())
        return self.root / name[:2] / name


def _stamp(info: os.stat_result, digest: str) -> Stamp:
    return Stamp(
        device=info.st_dev,
        inode=info.st_ino,
        size_bytes=info.st_size,
        mtime_ns=info.st_mtime_ns,
        ctime_ns=info.st_ctime_ns,
        digest=digest,
    )
