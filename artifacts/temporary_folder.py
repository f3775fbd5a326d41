"""The hidden folder a writer works in: locked while its writer lives, so that the next one knows which are left behind.

".OUT.llmc-tmp-<pid>-<random>" is being written, or is an old artifact being deleted; ".OUT.llmc-old-..." is an old artifact
moved aside where names cannot be swapped. The lock is flock(2) on the folder itself: it ends with the process, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmc.artifacts.filesystem import FileSystem, remove_tree

TEMPORARY = ".llmc-tmp-"
ASIDE = ".llmc-old-"
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def make_parents(fs: FileSystem, path: str) -> None:
    """mkdir -p; a folder that somebody else makes meanwhile is fine."""
    if os.path.isdir(path):
        return
    make_parents(fs, os.path.dirname(path))
    try:
        fs.mkdir(path)
    except FileExistsError:
        if not os.path.isdir(path):
            raise


def make_locked_folder(fs: FileSystem, out: Path) -> tuple[str, int]:
    """Make a folder beside `out` and lock it.

    Returns:
        Its name, and the descriptor that holds the lock.

    Raises:
        OSError: the system refused.
    """
    while True:
        name = f"{out.parent}/{_prefix(out, TEMPORARY)}{os.getpid()}-{secrets.token_hex(6)}"
        fs.mkdir(name)
        try:
            fd = fs.open_folder(name)
        except FileNotFoundError:
            continue  # taken for a left-over between these two calls; a new name then
        except OSError:
            fs.rmdir(name)
            raise
        if _lock(fd) and _names(name, fd):
            return name, fd
        os.close(fd)


def remove_stale(fs: FileSystem, out: Path) -> None:
    """Delete folders that killed writers of `out` left behind. Those of living writers are locked and stay."""
    for name in _left_behind(out, TEMPORARY) + (_left_behind(out, ASIDE) if out.exists() else []):
        try:
            fd = fs.open_folder(name)
        except FileNotFoundError:
            continue
        try:
            if os.fstat(fd).st_uid == os.geteuid() and _lock(fd, unsupported_means=False) and _names(name, fd):
                remove_tree(fs, name)
        finally:
            os.close(fd)


def recover(fs: FileSystem, out: Path) -> bool:
    """Put back an artifact that was moved aside by a writer killed before its own took the name. Returns whether one was."""
    if os.path.lexists(out) or not _left_behind(out, ASIDE):
        return False
    with locked_parent(fs, out.parent):
        names = _left_behind(out, ASIDE)
        if os.path.lexists(out) or not names:
            return False
        fs.rename(max(names, key=lambda name: os.stat(name).st_ctime_ns), str(out))
    return True


def swap_folders(fs: FileSystem, folder: str, out: Path) -> str | None:
    """Let a finished folder take the name of one that is there already. Whatever fails, one of the two has the name.

    Returns:
        The name under which the old folder lies now, to be deleted; None when nothing had the name any more, and nothing was done.

    Raises:
        OSError: the system refused.
    """
    try:
        fs.exchange(folder, str(out))
        return folder
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in _CANNOT_EXCHANGE:
            raise
    # the fallback: move the old one aside, then ours in. The lock keeps `recover` of others from running in between
    aside = folder.replace(TEMPORARY, ASIDE)
    with locked_parent(fs, out.parent):
        try:
            fs.rename(str(out), aside)
        except FileNotFoundError:
            return None
        try:
            fs.rename(folder, str(out))
        except OSError:
            fs.rename(aside, str(out))
            raise
    return aside


@contextmanager
def locked_parent(fs: FileSystem, parent: Path) -> Iterator[None]:
    """Hold the folder's lock; held for two renames at most."""
    fd = fs.open_folder(str(parent))
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _prefix(out: Path, kind: str) -> str:
    return f".{out.name[:180]}{kind}"


def _left_behind(out: Path, kind: str) -> list[str]:
    prefix = _prefix(out, kind)
    try:
        return sorted(f"{out.parent}/{name}" for name in os.listdir(out.parent) if name.startswith(prefix))
    except FileNotFoundError:
        return []


def _lock(fd: int, *, unsupported_means: bool = True) -> bool:
    """Try to take the lock. A file system without locks has no left-overs that can be told from work in progress: they stay."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES) and unsupported_means
    return True


def _names(path: str, fd: int) -> bool:
    """Whether the path still leads to the open folder."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False
