"""The program of an artifact, whatever compiled it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from llmc.artifacts.manifest import Entry, Image
from llmc.compiler.stages import StageLog
from llmc.kernels.build import BuiltKernels
from llmc.kernels.isa import TargetSpec


@dataclass(frozen=True, kw_only=True)
class Program:
    """Its entry and code, and what the report says of it.

    calls: functions outside the lowered code -> number of calls. from_torch: C functions that only libtorch has; none: it needs no
    torch. gpu: facts of a program for a GPU (`cuda.lowered`), or None.
    """

    entry: Entry
    images: list[Image]
    calls: Mapping[str, int]
    from_torch: tuple[str, ...] = ()
    gpu: Mapping[str, Any] | None = None


def built_kernels(kernels: Future[BuiltKernels], target: TargetSpec, log: StageLog) -> BuiltKernels:
    """Wait, as a stage, for the C++ kernels that were compiled meanwhile.

    Raises:
        what their compiling raised.
    """
    with log.stage("kernels") as note:
        built = kernels.result()
        note.detail = target.isa
    return built
