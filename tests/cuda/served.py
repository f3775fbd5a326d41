"""`llmc serve` of an artifact of plans, as its users start it, with the stand-in where the driver would be."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from tests.server.running import children

HEAVY = {"transformers", "torch", "torch._dynamo", "torch._inductor", "sympy", "triton"}

# Python runs a module of this name at start; ours says at the end what was imported, in every process of the tree.
_WITNESS = """
import atexit, json, os, sys
folder = os.environ["LLMC_TEST_WITNESS"]
atexit.register(lambda: open(os.path.join(folder, f"{os.getpid()}.json"), "w").write(json.dumps([sys.argv, sorted(sys.modules)])))
"""


def environment(libcuda: Path, server: Path, **knobs: int) -> dict[str, str]:
    """An environment in which libcuda.so.1 is the stand-in."""
    return os.environ | {
        "LD_LIBRARY_PATH": str(libcuda.parent),
        "STAND_IN_SERVER": str(server),
        "STAND_IN": ",".join(f"{name}={value}" for name, value in knobs.items()),
        "OMP_NUM_THREADS": "1",
    }


def command(artifact: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "llmc", "serve", str(artifact), "--port", "0", *flags]


class Served:
    """A running server; `modules` after `stop` are those of each of its processes."""

    def __init__(self, artifact: Path, folder: Path, environment: dict[str, str], *flags: str) -> None:
        self._seen = folder / "seen"
        self._seen.mkdir()
        (folder / "witness").mkdir()
        (folder / "witness" / "sitecustomize.py").write_text(_WITNESS)
        path = os.pathsep.join([str(folder / "witness"), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command(artifact, *flags),
                env=environment | {"PYTHONPATH": path, "LLMC_TEST_WITNESS": str(self._seen)},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        found = re.search(r"llmc ready at (\S+) ", self.process.stdout.readline())
        assert found is not None, self._log.read_text()
        self.http = httpx.Client(base_url=found[1], timeout=300)

    @property
    def engine(self) -> int:
        (pid,) = children(self.process.pid)
        return pid

    def complete(self, prompt: str | list[int], **fields: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": prompt, "temperature": 0, **fields})

    def mapped(self, pid: int) -> set[str]:
        """Names of the files that a process has mapped."""
        return {line.split("/")[-1].strip() for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/" in line}

    def modules(self) -> dict[int, set[str]]:
        return {int(path.stem): set(json.loads(path.read_text())[1]) for path in self._seen.glob("*.json")}

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.http.close()
