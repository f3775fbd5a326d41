"""What every benchmark shares: the machine's description, fresh processes, memory of a process tree, the results file.

A benchmark runs its baseline in the same run, alternating with llmc, and gives medians and ratios: these machines are noisy.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORK = Path(os.environ.get("LLMC_BENCH_DIR", Path.home() / ".cache" / "llmc-bench"))


def environment() -> dict[str, Any]:
    """Commit, machine and versions."""
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True, check=False)
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?"
    )
    versions = {}
    for package in ("llmc", "torch", "transformers", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "commit": git.stdout.strip(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "huge_pages": Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip(),
        "versions": versions,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def summary(values: Sequence[float]) -> dict[str, float]:
    """min, median, max."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "runs": len(values)}


def process_tree(pid: int) -> list[int]:
    """`pid` and every process below it."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                text = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue  # it ended meanwhile
            children.setdefault(int(text.rsplit(")", 1)[1].split()[1]), []).append(int(entry))
    found, queue = [], [pid]
    while queue:
        current = queue.pop()
        found.append(current)
        queue += children.get(current, [])
    return found


def pss_bytes(pid: int) -> int:
    """Proportional set size over the process tree, in bytes: shared pages are divided among those who share them."""
    total = 0
    for member in process_tree(pid):
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def warm(folder: Path) -> None:
    """Read every file below `folder` once, so that it is in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A running server: its process and the wall-clock second it was spawned."""

    process: subprocess.Popen[bytes]
    port: int
    spawned: float
    log: Path


@contextmanager
def server(command: list[str], log: Path, environ: dict[str, str] | None = None) -> Iterator[Server]:
    """Run an OpenAI-compatible server; `{port}` in the command is a free port. Its whole tree is gone afterwards."""
    port = free_port()
    with log.open("wb") as output:
        spawned = time.perf_counter()
        process = subprocess.Popen(
            [part.replace("{port}", str(port)) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environ or {})},
            start_new_session=True,
        )
        try:
            yield Server(process, port, spawned, log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def stream_completion(port: int, body: dict[str, Any], *, timeout: float = 600.0) -> Iterator[tuple[float, dict[str, Any]]]:
    """POST /v1/completions with `stream`; yields (arrival in perf_counter seconds, event).

    Raises:
        OSError: not reachable, or an answer other than 200.
    """
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("POST", "/v1/completions", json.dumps({**body, "stream": True}), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise OSError(f"status {response.status}: {response.read(300)!r}")
        for raw in response:
            if raw.startswith(b"data: ") and not raw.startswith(b"data: [DONE]"):
                yield time.perf_counter(), json.loads(raw[6:])
    finally:
        connection.close()


def first_token_seconds(running: Server, body: dict[str, Any], *, timeout: float = 600.0) -> float:
    """Seconds from the spawn of the server to the first token of a request that is tried every 5 ms."""
    deadline = time.perf_counter() + timeout
    while time.perf_counter() < deadline:
        if running.process.poll() is not None:
            raise RuntimeError(f"the server ended with status {running.process.returncode}:\n{running.log.read_text()[-2000:]}")
        try:
            for arrival, event in stream_completion(running.port, body):
                if event.get("choices"):
                    return arrival - running.spawned
        except OSError:
            time.sleep(0.005)
    raise RuntimeError(f"no token within {timeout} s:\n{running.log.read_text()[-2000:]}")


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


def finish(name: str, result: dict[str, Any], *, as_json: bool, table: str) -> None:
    """Store the result under benchmarks/results/ and print it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"benchmark": name, "environment": environment(), **result}, indent=2, sort_keys=True)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text if as_json else table)
