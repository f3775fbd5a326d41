"""Runs a list of passes over a graph: requires, run, ensures, verify, count, time, dump. Knows no pass by name."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch.fx import GraphModule

from llmc.errors import PassError
from llmc.passes import graph as G
from llmc.passes.base import Pass, PassContext, PassResult
from llmc.passes.cost import predicted
from llmc.passes.text import graph_text
from llmc.passes.verify import snapshot, violation

DUMP_VARIABLE = "LLMC_DUMP_DIR"


@dataclass(frozen=True, slots=True)
class PassReport:
    """One pass and what it did, in the order run; the manifest's pass records are made of these."""

    applied: Pass
    result: PassResult


@dataclass(frozen=True, slots=True)
class _Dump:
    """Writes 00-captured.txt, 01-<pass>.txt, ... into a directory, or nothing if there is none."""

    directory: Path | None

    def write(self, number: int, label: str, gm: GraphModule, ctx: PassContext) -> Path | None:
        if self.directory is None:
            return None
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{number:02}-{label}.txt"
        path.write_text(graph_text(gm, ctx.weights))
        return path


def dump_directory() -> Path | None:
    """Where the user asked for dumps: the environment variable LLMC_DUMP_DIR, unset or empty meaning nowhere."""
    named = os.environ.get(DUMP_VARIABLE)
    return Path(named) if named else None


def run_passes(gm: GraphModule, passes: Sequence[Pass], ctx: PassContext, *, dump_dir: Path | None = None) -> list[PassReport]:
    """Run `passes` in order over `gm`, in place. `ctx.weights` is rewritten with it.

    Args:
        gm: a graph whose nodes carry fake values in meta["val"] and whose constants are in `ctx.weights`.
        passes: what to run; an empty list leaves the graph as captured.
        ctx: the weight table and the facts passes may read.
        dump_dir: where the graph is written before the first and after each pass, see `dump_directory`; None: nowhere.

    Returns:
        One report per pass, in order.

    Raises:
        PassError: a pass failed or left the graph invalid; names the pass, those before it and the last dump.
    """
    dump = _Dump(dump_dir)
    last_dump = dump.write(0, "captured", gm, ctx)
    reports: list[PassReport] = []
    for number, applied in enumerate(passes, start=1):
        try:
            result = _run_one(gm, applied, ctx)
        except Exception as error:
            before = ", ".join(r.applied.name for r in reports) or "none"
            where = (
                f"the graph before it is in {last_dump}" if last_dump else f"set {DUMP_VARIABLE} to a directory to see the graph before it"
            )
            raise PassError(f"pass {applied.name} failed: {error} (passes before it: {before}; {where}). Please report this.") from error
        reports.append(PassReport(applied, result))
        last_dump = dump.write(number, applied.name, gm, ctx)
    gm.recompile()  # once: it writes the module's Python code, which no pass reads
    return reports


def _run_one(gm: GraphModule, applied: Pass, ctx: PassContext) -> PassResult:
    if lacking := applied.requires(gm):
        raise PassError(f"it requires what the graph lacks: {lacking}")
    before, cost = snapshot(gm), predicted(gm)
    start = time.perf_counter()
    result = applied.run(gm, ctx)
    seconds = time.perf_counter() - start
    if result.changed:
        for unread in ctx.weights.keep(G.read_constants(gm)):
            G.delete_attribute(gm, unread)
        if wrong := violation(gm, ctx.weights, before, inputs_may_change=applied.changes_inputs):
            raise PassError(f"it left an invalid graph: {wrong}")
    elif snapshot(gm).nodes != before.nodes:
        raise PassError("it says that it changed nothing, but the graph is another")
    if unkept := applied.ensures(gm):
        raise PassError(f"it does not keep its promise: {unkept}")
    after = predicted(gm) if result.changed else cost
    return replace(
        result,
        nodes_before=len(before.nodes),
        nodes_after=len(gm.graph.nodes),
        launches_saved=cost.launches - after.launches,
        bytes_saved=cost.nbytes - after.nbytes,
        seconds=seconds,
    )
