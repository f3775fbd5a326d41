"""Shared parts of the runtime's tests: the toy program, compiled once per test run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.toy_program import DIM, VOCAB


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with toy.so."""
    folder = tmp_path_factory.mktemp("toy")
    source = Path(__file__).with_name("toy_program.c")
    command = ["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", str(source), "-o", str(folder / "toy.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def toy_weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.normal(size=(VOCAB, DIM)).astype(np.float32) for name in ("embed", "head")}
