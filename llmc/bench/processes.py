"""Fresh processes for measurements, and the memory of a whole tree of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.errors import ConfigError, InternalError

_STOP_SECONDS = 30.0


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
            continue  # it ended meanwhile
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


@dataclass(frozen=True, kw_only=True)
class RunningServer:
    """A server we started. `spawned`: perf_counter seconds."""

    process: subprocess.Popen[bytes]
    port: int
    spawned: float
    log: Path

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]


def environment(**added: str) -> dict[str, str]:
    """This process's environment for one that is measured, which may keep bytecode: installed packages have theirs, and a llmc that
    runs from its source tree would compile that at every start."""
    return {**{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}, **added}


@contextmanager
def server(command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None) -> Iterator[RunningServer]:
    """Run an OpenAI-compatible server; `{port}` in the command is a free port. Its whole tree is gone afterwards."""
    port = free_port()
    with log.open("wb") as output:
        spawned = time.perf_counter()
        process = subprocess.Popen(
            [part.replace("{port}", str(port)) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(**(environ or {})),
            start_new_session=True,
        )
        try:
            yield RunningServer(process=process, port=port, spawned=spawned, log=log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def worker(module: str, request: Mapping[str, Any], *, threads: int, timeout_s: float = 3600.0) -> dict[str, Any]:
    """Run `python -m module` with a JSON argument on `threads` OpenMP threads; its last line of output is JSON.

    Raises:
        ConfigError: the worker refused what it was asked (its message), such as a model without a chat template.
        InternalError: it crashed.
    """
    environ = environment(OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1")
    command = [sys.executable, "-m", module, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=timeout_s, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        if 0 < done.returncode < 6 and lines:
            raise ConfigError(lines[-1])
        raise InternalError(f"{module} ended with status {done.returncode}:\n" + "\n".join(lines[-20:]))
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def llmc_command(*arguments: str) -> list[str]:
    """This very llmc, as a command of its own."""
    return [sys.executable, "-m", "llmc", *arguments]


def serve_command(artifact: Path, *, threads: int) -> list[str]:
    """`llmc serve` on `{port}`, quiet, the model named "bench"."""
    quiet = ["--disable-log-stats", "--served-model-name", "bench"]
    return llmc_command("serve", str(artifact), "--port", "{port}", "--threads", str(threads), *quiet)
