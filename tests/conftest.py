"""One compile cache per test run, shared by its workers and its child processes, and gone afterwards.

LLMC_CACHE_DIR in the environment keeps the cache where it says, for runs that follow each other.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.own_process import MODULES, ROOT, VARIABLE

_OWN_CACHE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    if "LLMC_CACHE_DIR" not in os.environ:  # workers of xdist start later and inherit it
        os.environ["LLMC_CACHE_DIR"] = config.stash[_OWN_CACHE] = tempfile.mkdtemp(prefix="llmc-test-cache-")
    os.environ.setdefault("LLMC_TEST_KERNEL_CACHE", os.path.join(os.environ["LLMC_CACHE_DIR"], "kernels"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Modules of own_process.py are collected where they are named, or in the process made for them."""
    name = collection_path.relative_to(ROOT).as_posix() if collection_path.is_relative_to(ROOT) else ""
    named = any(Path(argument.split("::")[0]).resolve() == collection_path for argument in config.args)
    return True if name in MODULES and VARIABLE not in os.environ and not named else None


def pytest_unconfigure(config: pytest.Config) -> None:
    if (own := config.stash.get(_OWN_CACHE, None)) is not None:
        shutil.rmtree(own, ignore_errors=True)
