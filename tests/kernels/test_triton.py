"""The Triton kernels: parity in Triton's interpreter, and machine code for sm_90 made without a GPU.

Whether Triton interprets is settled when it is first imported, so each half has a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install 'llmc[cuda]')")


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))}
    return kept | {"OMP_NUM_THREADS": "1"} | more


@pytest.mark.parametrize("file", sorted(p.name for p in (HERE / "triton").glob("test_*.py")))
def test_in_the_interpreter(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "triton" / file)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(TRITON_INTERPRET="1", LLMC_TRITON_TESTS="1"), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "llmc.kernels.aot"],
        cwd=ROOT, env=environment(TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton"))), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_compiles_for_sm_90_without_a_gpu(compiled: list[dict[str, Any]]) -> None:
    assert {r["case"]: r["stack_bytes"] for r in compiled if r["stack_bytes"]} == {}, "registers were spilled"
    assert {r["case"]: r["shared_bytes"] for r in compiled if r["shared_bytes"] > 232448} == {}, "more shared memory than a block has"
    assert [r["case"] for r in compiled if not r["same_bits"]] == [], "two builds of one kernel differ"
