"""`llmc bench kernels`: each CPU kernel of an artifact against what this machine can read and compute at most."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.artifacts.manifest import Limits
from llmc.bench.contenders import Say, opened
from llmc.bench.figure import figure
from llmc.bench.processes import worker
from llmc.bench.result import BenchResult, Cell, Chart, Column, Point, Table
from llmc.errors import ConfigError

MOST_DECODING = 64  # rows that are sequences with a token each
_ROWS, _CONTEXT = (1, 8, 512), 512
_WARMUP = 2  # calls that kernels/linear/bench.py makes of each contender before it times any


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """`rows`: tokens of the step; up to 64 they are decoding sequences of `context` tokens each, more are one prompt. None: what is usual,
    as far as the artifact takes it."""

    artifact: Path
    rows: tuple[int, ...] | None = None
    context: int | None = None
    seconds: float = 1.0  # per kernel and number of rows
    megabytes: int = 256  # of distinct weights, above every cache
    threads: int = 1
    seed: int = 0  # of activations, weights and the experts chosen

    def __post_init__(self) -> None:
        if self.rows is not None and (not self.rows or min(self.rows) < 1):
            raise ConfigError(f"--rows {','.join(map(str, self.rows))}: numbers of tokens, at least 1")
        if not 0 < self.seconds < math.inf:
            raise ConfigError(f"--seconds {self.seconds:g}: how long each kernel is timed, above 0")

    def within(self, limits: Limits) -> tuple[tuple[int, ...], int]:
        """Rows and context.

        Raises:
            ConfigError: more than the artifact takes.
        """
        most, longest = limits.max_num_batched_tokens, limits.max_model_len
        rows = self.rows if self.rows is not None else tuple(count for count in _ROWS if count <= min(most, longest))
        if max(rows) > most:
            raise ConfigError(f"--rows {max(rows)}: a step of this artifact has at most {most} tokens")
        if max(rows) > max(longest, MOST_DECODING):
            raise ConfigError(f"--rows {max(rows)}: is one prompt, and this artifact takes {longest} tokens at most")
        if (self.context or 0) > longest:
            raise ConfigError(f"--context {self.context}: a sequence of this artifact has at most {longest} tokens")
        return rows, self.context if self.context is not None else min(_CONTEXT, longest)


def bench_kernels(config: KernelsConfig, say: Say) -> BenchResult:
    """Time every kernel.

    Raises:
        ConfigError: the artifact has no CPU kernels, or its report is of an earlier version.
    """
    manifest = opened("llmc", config.artifact).manifest
    if manifest.target.kind != "cpu":
        raise ConfigError(f"{config.artifact}: was compiled for {manifest.target.name}; this measures the kernels of CPU artifacts")
    sizes, context = config.within(manifest.limits)
    say(f"{len(sizes)} size{'s' * (len(sizes) > 1)} of each kernel")
    request = {name: getattr(config, name) for name in ("seconds", "megabytes", "threads", "seed")} | {"rows": sizes, "context": context}
    found = worker("llmc.bench.kernel_worker", {**request, "artifact": str(config.artifact)}, threads=config.threads)
    if not found["rows"]:
        raise ConfigError(
            f"{config.artifact}: its report names no kernel that can be timed alone; compile it again with this llmc, at -O1 or -O2"
        )
    measured = against_limits(found)
    columns = [
        Column(key="name", title="kernel"),
        Column(key="rows", title="rows"),
        Column(key="count", title="calls"),
        Column(key="us", title="one call", unit="µs"),
        Column(key="gb_s", title="moves", unit="GB/s", better="higher"),
        Column(key="gflop_s", title="computes", unit="GFLOP/s", better="higher"),
        Column(key="of_limit", title="of the limit", unit="%", better="higher", digits=0),
        Column(key="share", title="share", unit="%", digits=0),
    ]
    rows: list[dict[str, Cell]] = [
        {
            **{name: row[name] for name in ("name", "rows", "count")},
            "us": figure(row["us_samples"]),
            "gb_s": row["bytes"] / row["us"] / 1e3,
            "gflop_s": row["flop"] / row["us"] / 1e3,
            "of_limit": 100 * row["of_limit"],
            "share": 100 * row["share"],
        }
        for row in measured["rows"]
    ]
    bandwidth, peak = measured["bandwidth_gb_s"], measured["peak_gflop_s"]
    notes = [f"Limits measured in the same run: {bandwidth:.1f} GB/s read, {peak:.0f} GFLOP/s ({measured['dtype']})."]
    if measured["left_out"]:
        notes.append(f"Not timed alone: {', '.join(measured['left_out'])}; fused pointwise code is not among the kernels either.")
    if any(row["of_limit"] > 1 for row in measured["rows"]):
        notes.append("Above 100 %: attention whose keys and values came from the processor's caches, or a machine that was busy meanwhile.")
    points = [
        Point(
            x=row["flop"] / row["bytes"],
            y=row["flop"] / row["us"] / 1e3,
            label=f"{row['name']} ({row['rows']})",
            marked=row["of_limit"] > 0.7,
        )
        for row in measured["rows"]
    ]
    low, ridge, high = min(point.x for point in points), peak / bandwidth, max(point.x for point in points)
    roof = [(x, min(peak, x * bandwidth)) for x in sorted({low, ridge, max(high, 2 * ridge)})]
    chart = Chart(title="Roofline", x_title="flop per byte", y_title="GFLOP/s", points=points, line=roof, logarithmic=True)
    timed = [row["timed_calls"] for row in measured["rows"]]
    repeats = {"warmup": _WARMUP, "repeats": f"{min(timed)} to {max(timed)} calls of each kernel, in runs of as many"}
    workload: dict[str, Any] = {"artifact": str(config.artifact), **request, **repeats}
    return BenchResult(
        benchmark="kernels",
        workload=workload,
        tables=[Table(title=f"{config.artifact}: kernels", columns=columns, rows=rows, notes=notes, bars=False)],
        charts=[chart],
        details={"kernels": measured},
    )


def against_limits(found: Mapping[str, Any]) -> dict[str, Any]:
    """The worker's answer with, per row, `of_limit` (the time that reading and computing would take at least, over the time taken)
    and `share` (of the time of all kernels of a step with as many rows)."""
    whole: dict[int, float] = {}
    for row in found["rows"]:
        whole[row["rows"]] = whole.get(row["rows"], 0.0) + row["count"] * row["us"]
    rows = []
    for row in found["rows"]:
        least_us = max(row["bytes"] / found["bandwidth_gb_s"], row["flop"] / found["peak_gflop_s"]) / 1e3
        rows.append({**row, "of_limit": least_us / row["us"], "share": row["count"] * row["us"] / whole[row["rows"]]})
    return {**found, "rows": rows}
