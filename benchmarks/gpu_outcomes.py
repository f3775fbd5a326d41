"""A pytest plugin: what every test came to, written anew as tests end, so that a run that is cut still says what it found.

    pytest -p benchmarks.gpu_outcomes          # with GPU_CHECK_JSON naming the file

{"part", "machine", "counts": {"passed": 3, ...}, "failed": [{"test", "error"}], "skipped": {reason: count}, "slowest": [[seconds, test]]}
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_machine

_EVERY_SECONDS = 2.0
_SLOWEST = 20


class Outcomes:
    """Collects reports and writes them to `file`."""

    def __init__(self, file: Path, stand_in: bool) -> None:
        self._file = file
        self._machine = gpu_machine.facts(stand_in)
        self._counts: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._failed: list[dict[str, str]] = []
        self._seconds: list[tuple[float, str]] = []
        self._written = 0.0
        self._write()

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for the setup, the call and the teardown of each test."""
        if report.when == "call":
            self._seconds.append((round(report.duration, 2), report.nodeid))
        if report.failed:
            self._failed.append({"test": report.nodeid, "error": str(report.longrepr)[-2000:]})
            self._counts["failed"] += 1
        elif report.skipped:
            self._skipped[report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)] += 1
            self._counts["skipped"] += 1
        elif report.when == "call":
            self._counts["passed"] += 1
        if time.monotonic() - self._written > _EVERY_SECONDS:
            self._write()

    @pytest.hookimpl
    def pytest_sessionfinish(self) -> None:
        """The last word."""
        self._write()

    def _write(self) -> None:
        found: dict[str, Any] = {
            "part": self._file.stem, "machine": self._machine, "counts": dict(self._counts), "failed": self._failed,
            "skipped": dict(self._skipped), "slowest": sorted(self._seconds, reverse=True)[:_SLOWEST],
        }  # fmt: skip
        self._file.write_text(json.dumps(found, indent=1) + "\n")
        self._written = time.monotonic()


def pytest_configure(config: pytest.Config) -> None:
    """Begin where GPU_CHECK_JSON names a file; workers of pytest-xdist leave it to the process that started them."""
    if (file := os.environ.get("GPU_CHECK_JSON")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(Path(file), bool(os.environ.get("GPU_CHECK_STAND_IN"))))
