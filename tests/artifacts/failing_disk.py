"""A file system whose n-th call fails."""

from __future__ import annotations

import os
from typing import Any

from llmc.artifacts.filesystem import FileSystem

CALLS = ("mkdir", "create", "open_folder", "open_source", "read", "write", "fsync", "rename", "exchange", "link", "unlink", "rmdir")


class Faulty(FileSystem):
    """Fails the n-th call (counted from 0), once, or every call from then on."""

    def __init__(self, fail_at: int, code: int, *, for_good: bool = False) -> None:
        self._left, self._code, self._for_good = fail_at, code, for_good
        self.failed = ""

    def __getattribute__(self, name: str) -> Any:
        real = super().__getattribute__(name)
        if name not in CALLS:
            return real

        def call(*args: Any) -> Any:
            self._left -= 1
            if self._left == -1 or (self._left < -1 and self._for_good):
                self.failed = self.failed or name
                raise OSError(self._code, os.strerror(self._code))
            return real(*args)

        return call
