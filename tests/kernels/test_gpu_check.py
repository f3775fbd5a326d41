"""benchmarks/gpu_check.sh: runs from a plain checkout, says what is missing, and goes through its parts without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_check import overlay

ROOT = Path(__file__).resolve().parents[2]


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = ["bash", str(ROOT / "benchmarks" / "gpu_check.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_the_rooms_are_one_package_without_an_installation(tmp_path: Path) -> None:
    code = "import llmc.errors, llmc.kernels; print(llmc.kernels.__file__)"
    command = [sys.executable, "-S", "-P", "-c", code]  # -S: nothing that is installed can be seen; -P: nor the checkout
    found = subprocess.run(command, env={"PYTHONPATH": str(overlay(tmp_path))}, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(tmp_path / "llmc" / "kernels" / "__init__.py")


def test_says_that_a_gpu_is_missing() -> None:
    done = gpu_check("kernels")
    assert done.returncode == 1
    assert done.stderr.startswith("gpu_check needs an NVIDIA GPU") and len(done.stderr.splitlines()) == 1


def test_an_unknown_part_is_refused() -> None:
    assert "no part is called everything; there are parity, kernels" in gpu_check("everything").stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install 'llmc[cuda]')")
@pytest.mark.parametrize("only", ["argmax 1x", pytest.param("", marks=pytest.mark.slow)])
def test_the_stand_in_compiles_what_would_be_measured(tmp_path: Path, only: str) -> None:
    done = gpu_check("kernels", "--stand-in", "--only", only, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert report["failed"] == [] and len(report["results"]) >= 1
    assert all(case["launches"] for case in report["results"])
