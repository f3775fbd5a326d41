"""Every file-system call that changes something, in one place: tests make the n-th one fail."""

from __future__ import annotations

import ctypes
import errno
import os
import stat

from llmc.errors import ArtifactError

FILE_MODE = 0o444  # what is published is read, never edited; the umask may take more away, never add
FOLDER_MODE = 0o755

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class FileSystem:
    """The operating system's calls, as they are. All raise OSError."""

    def mkdir(self, path: str) -> None:
        os.mkdir(path, FOLDER_MODE)

    def create(self, path: str) -> int:
        """Open a new file for writing; one that is there already is an error."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)

    def open_folder(self, path: str) -> int:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def open_source(self, path: str) -> int:
        """Open a file to be copied from."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, fd: int, size: int) -> bytes:
        return os.read(fd, size)

    def write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def rename(self, source: str, target: str) -> None:
        """rename(2): replaces a file or an empty folder, refuses a folder that holds something."""
        os.rename(source, target)

    def exchange(self, one: str, other: str) -> None:
        """Swap two names in one step (renameat2 RENAME_EXCHANGE). ENOSYS or EINVAL where it is not supported."""
        libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "renameat2"):
            raise OSError(errno.ENOSYS, "this C library has no renameat2", one)
        if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), one)

    def link(self, source: str, target: str) -> None:
        os.link(source, target, follow_symlinks=False)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)


OS = FileSystem()


def write_all(fs: FileSystem, fd: int, data: bytes | memoryview) -> None:
    """Write every byte, however many calls it takes."""
    view = memoryview(data).cast("B")
    while len(view):
        view = view[fs.write(fd, view) :]


def sync_folder(fs: FileSystem, path: str) -> None:
    """Make a folder's names survive a power cut."""
    fd = fs.open_folder(path)
    try:
        fs.fsync(fd)
    finally:
        os.close(fd)


def remove_tree(fs: FileSystem, path: str) -> None:
    """Delete a folder and what is in it, following no link; what somebody else deleted meanwhile is fine."""
    try:
        entries = list(os.scandir(path))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            remove_tree(fs, entry.path)
        else:
            _gone_is_fine(fs.unlink, entry.path)
    _gone_is_fine(fs.rmdir, path)


def _gone_is_fine(call: object, path: str) -> None:
    assert callable(call)
    try:
        call(path)
    except FileNotFoundError:
        return


def explain_os_error(error: OSError, doing: str, path: str, *, needed_bytes: int | None = None) -> ArtifactError:
    """Turn the system's error into one sentence that says what was needed and what to do.

    Args:
        error: what the system said.
        doing: "writing weights/model.safetensors", for the message.
        path: where; free space is asked for here.
        needed_bytes: how much was to be written, if it is known.
    """
    reason = os.strerror(error.errno) if error.errno else str(error)
    text = f"{path}: {doing} failed: {reason}"
    if needed_bytes is not None:
        text += f"; {needed_bytes} bytes were needed"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = _free_bytes(path)
        text += f", {free} are free on that file system" if free is not None else ""
        text += "; free some space and run again"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        text += "; raise the limit on open files (ulimit -n) and run again"
    return ArtifactError(f"{text}. What was there before is untouched")


def _free_bytes(path: str) -> int | None:
    """Bytes free where `path` is, or will be; None if the system does not say."""
    while path and not os.path.exists(path):
        path = os.path.dirname(path)
    try:
        info = os.statvfs(path or ".")
    except OSError:
        return None
    return info.f_bavail * info.f_frsize


def require_free_bytes(path: str, needed_bytes: int) -> None:
    """Raise OSError(ENOSPC) now rather than after gigabytes were written."""
    free = _free_bytes(path)
    if free is not None and free < needed_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def is_private(mode: int) -> bool:
    """Whether neither the group nor others may write."""
    return not mode & (stat.S_IWGRP | stat.S_IWOTH)
