"""Build the stand-in for libcuda and talk to it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("stand_in.c")


def build(folder: Path) -> Path:
    """Compile it as libcuda.so.1 in a folder."""
    library = folder / "libcuda.so.1"
    command = ["cc", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


class StandIn:
    """A stand-in with a state of its own: each is loaded from another file."""

    def __init__(self, built: Path, folder: Path, server: Path | None = None) -> None:
        self.path = folder / f"stand_in_{len(list(folder.glob('stand_in_*')))}.so"
        shutil.copy(built, self.path)
        self._library = ctypes.CDLL(str(self.path))
        self._library.stand_in_get.restype = ctypes.c_long
        self._library.stand_in_get.argtypes = [ctypes.c_char_p]
        self._library.stand_in_set.argtypes = [ctypes.c_char_p, ctypes.c_long]
        if server is not None:
            self._library.stand_in_server(str(server).encode())

    def set(self, **knobs: int) -> None:
        for name, value in knobs.items():
            self._library.stand_in_set(name.encode(), value)

    def get(self, name: str) -> int:
        return int(self._library.stand_in_get(name.encode()))
