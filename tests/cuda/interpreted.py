"""Models compiled for a GPU, and a process that runs their kernels in Triton's interpreter for the stand-in."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import llmc.compiler.cuda.lowered as lowered
import llmc.compiler.cuda.sampling as sampling
from llmc.artifacts.manifest import SamplingRecord
from llmc.compiler.cuda.planner import PlannedProgram
from llmc.compiler.cuda.program import CudaProgram
from llmc.compiler.driver import compile_model
from llmc.config.compile import CompileConfig

ROOT = Path(__file__).parents[2]
TARGET = "cuda:sm_90"


def compile_recorded(model: Path, out: Path, *, sampling_kinds: tuple[str, ...] = ("check",), **settings: Any) -> Path:
    """Compile a model, and write what its kernels were compiled from beside the artifact. Returns the file of sources.

    Args:
        sampling_kinds: of `sampling.KINDS`; what is left out goes by the logits.
    """
    records: dict[tuple[str, str], dict[str, Any]] = {}

    def recorded(*args: Any, **options: Any) -> CudaProgram:
        program = compile_program(*args, **options)
        keep(program.plans.values())
        return program

    def recorded_sampling(*args: Any) -> list[tuple[SamplingRecord, PlannedProgram]]:
        found = compile_sampling(*args)
        keep(program for _, program in found)
        return found

    def keep(programs: Iterable[PlannedProgram]) -> None:
        for made in programs:
            for kernel, source in zip(made.plan.kernels, made.sources, strict=True):
                sha256 = made.plan.images[kernel.image].sha256
                record = {"sha256": sha256, "entry": kernel.entry, "source": dataclasses.asdict(source)}
                records.setdefault((sha256, kernel.entry), record)

    compile_program, compile_sampling = lowered.compile_program, sampling.compile_sampling
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowered, "compile_program", recorded)
        patch.setattr(sampling, "compile_sampling", recorded_sampling)
        patch.setattr(sampling, "KINDS", sampling_kinds)
        compile_model(CompileConfig(model=model, out=out, target=TARGET, **settings), store=None)
    assert records
    sources = out.parent / f"{out.name}.sources" / "sources.json"
    sources.parent.mkdir()
    sources.write_text(json.dumps(list(records.values())))
    return sources


class Interpreter:
    """The process. `path`: the socket a stand-in connects to."""

    def __init__(self, sources: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="llmc-")  # a socket's name may have 107 bytes; the sources' folder is long
        self.path = Path(self._folder.name) / "kernels.socket"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cuda.stand_in_server", str(self.path), str(sources)],
            cwd=ROOT,
            env=kept | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._folder.cleanup()
