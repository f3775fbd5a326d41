"""What a figure taken on a GPU is to be read against: device, clocks, versions, commit, and what this very machine can do at most."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "numpy", "msgspec", "uvicorn", "pyzmq")
_SMI = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


def facts(stand_in: bool) -> dict[str, Any]:
    """Commit, machine and versions; clocks where there is a GPU."""
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True, check=False)
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    found: dict[str, Any] = {
        # a copied tree has no git: then whoever copies it says what it is
        "commit": git.stdout.strip() or os.environ.get("LLMC_COMMIT", "unknown"),
        "device": "none: stand-in" if stand_in else smi().get("name", "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return found if stand_in else found | {"smi": smi()}


def smi() -> dict[str, str]:
    """What nvidia-smi says of the first GPU, empty where there is no such program."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
    except OSError:
        return {}
    first = done.stdout.splitlines()[:1]
    return dict(zip(_SMI, (value.strip() for value in first[0].split(",")), strict=False)) if done.returncode == 0 and first else {}


def ceilings() -> dict[str, float]:
    """Measured now: bytes/s of a copy on the GPU (read and written both count), from pinned host memory, and flop/s of a bf16 matmul."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    matrix = 2 * 8192**3 / _seconds(lambda: a @ b, 20)
    copy, upload = _copy_rates()
    torch.cuda.empty_cache()
    return {"copy_bytes_per_s": copy, "upload_bytes_per_s": upload, "bf16_flop_per_s": matrix}


def _copy_rates() -> tuple[float, float]:
    import torch

    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    front = target[: host.numel()]
    copy = 2 * source.numel() / _seconds(lambda: target.copy_(source), 10)
    return copy, host.numel() / _seconds(lambda: front.copy_(host, non_blocking=True), 5)


def _seconds(call: Callable[[], object], repeats: int) -> float:
    import torch

    for _ in range(3):
        call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / repeats
