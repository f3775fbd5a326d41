"""Runs the test modules of own_process.py; `pytest FILE` alone runs one directly."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.own_process import MODULES, ROOT, VARIABLE


@pytest.mark.parametrize("module", MODULES)
def test_in_a_process_of_its_own(module: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", module]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env={**clean, VARIABLE: "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
