"""The program of an artifact, whatever compiled it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmc.artifacts.manifest import Entry, Image


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
