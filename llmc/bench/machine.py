"""Where a measurement was taken: commit, machine, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

_PACKAGES = ("llmc", "torch", "transformers", "numpy")


def environment(packages: tuple[str, ...] = _PACKAGES) -> dict[str, Any]:
    """Commit, machine and versions; what cannot be found out is said to be unknown."""
    return {
        "commit": commit(Path(__file__).parent),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "huge_pages": _text("/sys/kernel/mm/transparent_hugepage/enabled"),
        "versions": {package: _version(package) for package in packages},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit(folder: Path) -> str:
    """The git commit of the sources at `folder`, "-dirty" when they differ from it, or "unknown" for an installed package, even one
    that lies in somebody else's repository."""
    try:
        if _git(folder, "ls-files", "--error-unmatch", ".") is None:
            return "unknown"
        return _git(folder, "describe", "--always", "--dirty", "--abbrev=12") or "unknown"
    except OSError:
        return "unknown"


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says; None if it refuses."""
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_name() -> str:
    """As /proc/cpuinfo names it."""
    lines = _text("/proc/cpuinfo").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
