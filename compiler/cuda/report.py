"""The kernel table of a program for a GPU: what runs, how large it is, what it holds of an SM, how often it is launched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmc.artifacts.cubin import read_cubin

if TYPE_CHECKING:  # a report is rendered without torch
    from llmc.compiler.cuda.planner import PlannedProgram

# Bytes of stack per thread; the budget is `schedule.SPILL_BUDGET_BYTES`.
COLUMNS = ("kernel", "grid", "registers", "shared bytes", "spilled bytes", "image bytes", "launches")


def kernel_table(plans: Mapping[str, PlannedProgram]) -> list[dict[str, Any]]:
    """One row per image, in order of first use.

    Args:
        plans: by the name of their size.

    Returns:
        Rows of plain data: name, sha256, grid (of the first launch), registers, shared_bytes, spill_bytes, image_bytes,
        launches (size -> count).
    """
    rows: dict[str, dict[str, Any]] = {}
    for size, made in plans.items():
        for launch in made.plan.launches:
            kernel = made.plan.kernels[launch.kernel]
            sha256 = made.plan.images[kernel.image].sha256
            if sha256 not in rows:
                image = made.images[sha256]
                found = read_cubin(image, kernel.entry).kernels[kernel.entry]
                rows[sha256] = {
                    "name": kernel.entry,
                    "sha256": sha256,
                    "grid": list(launch.grid),
                    "registers": found.registers,
                    "shared_bytes": kernel.shared_bytes + found.shared_bytes,
                    "spill_bytes": found.frame_bytes,
                    "image_bytes": len(image),
                    "launches": {},
                }
            counts = rows[sha256]["launches"]
            counts[size] = counts.get(size, 0) + 1
    return list(rows.values())


def table_rows(facts: Mapping[str, Any]) -> list[list[str]]:
    """The table as text, a row per kernel under COLUMNS; `facts` as the report holds them."""
    return [
        [
            row["name"],
            "x".join(map(str, row["grid"])),
            str(row["registers"]),
            str(row["shared_bytes"]),
            str(row["spill_bytes"]),
            str(row["image_bytes"]),
            _launches(row["launches"]),
        ]
        for row in facts["kernels"]
    ]


def _launches(counts: Mapping[str, int]) -> str:
    """ "28 in decode 1 .. decode 64" rather than nine equal numbers."""
    runs: list[tuple[int, str, str]] = []
    for size, count in counts.items():
        if runs and runs[-1][0] == count:
            runs[-1] = (count, runs[-1][1], size)
        else:
            runs.append((count, size, size))
    return ", ".join(f"{count} in {first}" if first == last else f"{count} in {first} to {last}" for count, first, last in runs)
