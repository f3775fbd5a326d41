"""What the start of a server does to be quick: the engine's environment, imports without the garbage collector."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from llmc.runtime.engine_spawn import spawn_engine
from llmc.runtime.quick_imports import without_collections

SAY_THREADS = "import os, pathlib, sys; sys.stdin.read(); pathlib.Path(sys.argv[1]).write_text(os.environ['OPENBLAS_NUM_THREADS'])"


@pytest.mark.parametrize(("given", "found"), [(None, "1"), ("3", "3")])
def test_an_engine_has_one_blas_thread_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, found: str
) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", given)
    said = tmp_path / "said"
    handle = spawn_engine({}, command=(sys.executable, "-c", SAY_THREADS, str(said)))
    try:
        assert handle.process.wait(timeout=60) == 0
    finally:
        handle.remove_directory()
    assert said.read_text() == found


def test_the_collector_is_as_it_was_behind_imports() -> None:
    assert gc.isenabled()
    with pytest.raises(ImportError), without_collections():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collections():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
