"""`llmc bench sweep`: levels, quantisations, batches and threads of one model, and which of them nothing beats."""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmc.bench.contenders import Say, Variant, compile_variant, engine_rows
from llmc.bench.figure import Figure, figure
from llmc.bench.result import BenchResult, Cell, Chart, Column, Point, Table
from llmc.bench.workload import Mode
from llmc.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Every combination is measured; `quantizations` may hold "none"."""

    model: Path
    levels: tuple[int, ...] = (2,)
    quantizations: tuple[str, ...] = ("none",)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    threads: tuple[int, ...] = (1,)
    prompt_tokens: int = 128
    new_tokens: int = 64
    rounds: int = 3
    warmup: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.levels and self.quantizations and self.batches and self.threads):
            raise ConfigError("--levels, --quantization, --batch and --threads each name at least one value")
        if min(*self.batches, *self.threads) < 1:
            raise ConfigError("--batch and --threads: numbers from 1 on")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One combination: tokens per second that each sequence gets, and that all get together."""

    name: str
    each: Figure
    together: Figure


def bench_sweep(config: SweepConfig, say: Say) -> BenchResult:
    """Compile each variant once, then measure all combinations in turns.

    Raises:
        ConfigError: a variant does not compile.
    """
    with tempfile.TemporaryDirectory(prefix="llmc-bench-") as folder:
        artifacts = {}
        for level, scheme in itertools.product(config.levels, config.quantizations):
            name = f"-O{level}" if scheme == "none" else f"-O{level} {scheme}"
            say(f"compile {name}")
            options = (f"-O{level}",) if scheme == "none" else (f"-O{level}", "--quantization", scheme)
            artifacts[name] = compile_variant(
                config.model, Variant(name=name, options=options), Path(folder) / name.replace(" ", "-").lstrip("-")
            )
        longest = min(one.manifest.limits.max_model_len for one in artifacts.values())
        samples: dict[str, tuple[list[float], list[float]]] = {}
        for number in range(config.rounds):
            say(f"round {number + 1} of {config.rounds}")
            for (name, one), threads in itertools.product(artifacts.items(), config.threads):
                modes = [
                    Mode(name=str(batch), batch=batch, prompt_tokens=config.prompt_tokens, new_tokens=config.new_tokens).within(longest)
                    for batch in config.batches
                ]
                found = engine_rows(
                    one.artifact, modes, threads=threads, warmup=config.warmup, repeats=1, seed=config.seed + 1000 * number
                )["modes"]
                for batch in config.batches:
                    (row,) = found[str(batch)]
                    each, together = samples.setdefault(f"{name}, batch {batch}, {threads} threads", ([], []))
                    each.append(1e3 / statistics.fmean(row["step_ms"]))
                    together.append(row["decode_tok_s"])
    return summarised(config, [Measured(name=name, each=figure(e), together=figure(t)) for name, (e, t) in samples.items()])


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in one coordinate without losing in the other, by rising x. More is better in both."""
    front: list[int] = []
    best = float("-inf")
    for index in sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            front.append(index)
    return front[::-1]


def summarised(config: SweepConfig, found: Sequence[Measured]) -> BenchResult:
    """Table and Pareto plot."""
    points = [(one.each.median, one.together.median) for one in found]
    front = pareto(points)
    rows: list[dict[str, Cell]] = [
        {"name": one.name, "each": one.each, "together": one.together, "front": "yes" if index in front else ""}
        for index, one in enumerate(found)
    ]
    columns = [
        Column(key="name", title="combination"),
        Column(key="each", title="each sequence", unit="tok/s", better="higher"),
        Column(key="together", title="all together", unit="tok/s", better="higher"),
        Column(key="front", title="unbeaten"),
    ]
    chart = Chart(
        title="Speed of each against speed of all",
        x_title="tokens per second of each sequence",
        y_title="tokens per second of all",
        points=[Point(x=x, y=y, label=found[i].name if i in front else "", marked=i in front) for i, (x, y) in enumerate(points)],
        line=[points[i] for i in front],
    )
    names = ("levels", "quantizations", "batches", "threads", "prompt_tokens", "new_tokens", "rounds", "warmup", "seed")
    return BenchResult(
        benchmark="sweep",
        workload={"model": str(config.model), **{name: getattr(config, name) for name in names}},
        tables=[Table(title=f"{config.model}: sweep", columns=columns, rows=rows)],
        charts=[chart],
    )
