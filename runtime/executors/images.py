"""Loading an artifact's shared objects, each once per process, from the descriptor that was verified.

A path could name another file by the time the loader opens it; `/proc/self/fd/N` names the file whose hash was checked.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading

from llmc.errors import ArtifactError, ConfigError
from llmc.runtime.executors.dynamic_library import open_library

_lock = threading.Lock()
_by_hash: dict[tuple[str, bool, bool], ctypes.CDLL] = {}
_global_roles: dict[str, str] = {}  # role -> sha256 of the image that serves it to the whole process
# Model images find these by the name they ask for, which is the same for every build: one per process, and bound in one way.
_BY_NAME = ("tensor_runtime",)
_MISSING = re.compile(r"(lib(?:gomp|stdc\+\+|gcc_s)\.so\.\d+): cannot open shared object file")
# A function that every image of a role has, by which it is seen whose functions the process would call.
_MARKS = {"kernels": "llmc_paged_attention", "aoti_shim": "aoti_torch_cpu_llmc_paged_attention"}


def load_image(fd: int, *, sha256: str, role: str, shared: bool, own_first: bool = False) -> ctypes.CDLL:
    """Map one verified image.

    Args:
        fd: open descriptor of the verified file; duplicated, the caller keeps its own.
        sha256: of the file, its identity.
        role: "kernels", "aoti_shim", "tensor_runtime" or "model".
        shared: its symbols serve images loaded later. Two different images cannot do this for one role in one process, because
            the first would answer for both.
        own_first: see `open_library`.

    Raises:
        ConfigError: another image already serves this role in this process.
        ArtifactError: the system's loader refuses the image.
    """
    with _lock:
        if (shared or role in _BY_NAME) and _global_roles.setdefault(role, sha256) != sha256:
            raise ConfigError(
                f"this process already runs the {role} image of another artifact ({_global_roles[role][:12]}, now {sha256[:12]}); "
                "use one process per artifact"
            )
        if role in _BY_NAME and (sha256, shared, not own_first) in _by_hash:
            raise ConfigError(f"this process already runs the {role} image, bound in another way; use one process per artifact")
        key = (sha256, shared, own_first)
        library = _by_hash.get(key)
        if library is None:
            # The duplicate is never closed: the loader remembers libraries by name, so a number used again would give the wrong one
            path = f"/proc/self/fd/{os.dup(fd)}"
            try:
                library = open_library(path, shared=shared, own_first=own_first)
            except OSError as error:
                if (missing := _MISSING.match(str(error))) is not None:
                    raise ConfigError(
                        f"the {role} image needs {missing[1]}, a library of the C++ compiler's, which is not on this machine; install it "
                        "(Debian, Ubuntu: apt-get install libgomp1 libstdc++6)"
                    ) from error
                raise ArtifactError(f"the {role} image {sha256[:12]} cannot be loaded: {error}; compile the artifact again here") from error
            if shared:
                _check_serves(library, role, sha256)
            _by_hash[key] = library
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
