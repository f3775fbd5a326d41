"""What every benchmark shares, most of it from `llmc bench`: fresh processes, memory of a process tree, the results file.

A benchmark runs its baseline in the same run, alternating with llmc, and gives medians and ratios: these machines are noisy.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmc.bench import openai_client
from llmc.bench.machine import environment
from llmc.bench.openai_client import first_token_seconds
from llmc.bench.processes import RunningServer as Server
from llmc.bench.processes import process_tree, pss_bytes, server, warm

__all__ = ["ROOT", "WORK", "Server", "compiled", "environment", "finish", "first_token_seconds", "json_of", "process_tree", "pss_bytes",
           "server", "stream_completion", "summary", "warm"]  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORK = Path(os.environ.get("LLMC_BENCH_DIR", Path.home() / ".cache" / "llmc-bench"))


def summary(values: Sequence[float]) -> dict[str, float]:
    """min, median, max."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "runs": len(values)}


def stream_completion(port: int, body: dict[str, Any]) -> Iterator[tuple[float, dict[str, Any]]]:
    """As llmc.bench.openai_client, of a server on this machine."""
    return openai_client.stream_completion(f"http://127.0.0.1:{port}", body)


def json_of(command: list[str], environ: dict[str, str] | None = None, timeout: float = 900.0) -> dict[str, Any]:
    """Run a worker process; its last line of output is JSON."""
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **(environ or {})}, timeout=timeout, check=False, cwd=ROOT
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def compiled(model: Path, out: Path, *options: str) -> float:
    """`llmc compile` into `out`, replacing what is there; returns its seconds."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "llmc", "compile", str(model), "-o", str(out), "--force", *options],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    return time.perf_counter() - started


def finish(name: str, result: dict[str, Any], *, as_json: bool, table: str, keep: bool = True) -> None:
    """Print the result, and store it under benchmarks/results/ unless it is a trial (keep=False)."""
    text = json.dumps({"benchmark": name, "environment": environment(), **result}, indent=2, sort_keys=True)
    if keep:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text if as_json else table)
