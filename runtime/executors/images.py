"""Loading an artifact's shared objects, each once per process, from the descriptor that was verified.

A path could name another file by the time the loader opens it; `/proc/self/fd/N` names the file whose hash was checked.
"""

from __future__ import annotations

import ctypes
import os
import threading

from llmc.errors import ArtifactError, ConfigError
from llmc.runtime.executors.dynamic_library import open_library

_lock = threading.Lock()
_by_hash: dict[tuple[str, bool], ctypes.CDLL] = {}
_global_roles: dict[str, str] = {}  # role -> sha256 of the image that serves it to the whole process
# A function that every image of a role has, by which it is seen whose functions the process would call.
_MARKS = {"kernels": "llmc_paged_attention", "aoti_shim": "aoti_torch_cpu_llmc_paged_attention"}


def load_image(fd: int, *, sha256: str, role: str, shared: bool) -> ctypes.CDLL:
    """Map one verified image.

    Args:
        fd: open descriptor of the verified file; duplicated, the caller keeps its own.
        sha256: of the file, its identity.
        role: "kernels", "aoti_shim" or "model".
        shared: its symbols serve images loaded later. Two different images cannot do this for one role in one process, because
            the first would answer for both.

    Raises:
        ConfigError: another image already serves this role in this process.
        ArtifactError: the system's loader refuses the image.
    """
    with _lock:
        if shared and _global_roles.setdefault(role, sha256) != sha256:
            raise ConfigError(
                f"this process already runs the {role} image of another artifact ({_global_roles[role][:12]}, now {sha256[:12]}); "
                "use one process per artifact"
            )
        library = _by_hash.get((sha256, shared))
        if library is None:
            # The duplicate is never closed: the loader remembers libraries by name, so a number used again would give the wrong one
            path = f"/proc/self/fd/{os.dup(fd)}"
            try:
                library = open_library(path, shared=shared)
            except OSError as error:
                raise ArtifactError(f"the {role} image {sha256[:12]} cannot be loaded: {error}; compile the artifact again here") from error
            if shared:
                _check_serves(library, role, sha256)
            _by_hash[(sha256, shared)] = library
        return library


def _check_serves(library: ctypes.CDLL, role: str, sha256: str) -> None:
    """Refuse a process in which another library answers for this image: the program would run kernels of another build, and give
    other bits, without a word."""
    mark = _MARKS.get(role)
    if mark is None or not hasattr(library, mark):
        return
    own = ctypes.cast(getattr(library, mark), ctypes.c_void_p).value
    found = ctypes.cast(getattr(ctypes.CDLL(None), mark), ctypes.c_void_p).value
    if found != own:
        raise ConfigError(
            f"this process already holds another library with llmc's {role} functions, which would answer for image {sha256[:12]}; "
            "load the artifact in a process of its own"
        )
