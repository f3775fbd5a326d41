"""`llmc bench sweep`: levels, quantisations, batches and threads of one model, and which of them nothing beats."""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmc.bench.contenders import Compiled, Say, Variant, compile_variant, engine_rows, hf_rows, refuse_longer, refuse_unknown
from llmc.bench.figure import Figure, figure
from llmc.bench.result import BenchResult, Cell, Chart, Column, Point, Table
from llmc.bench.workload import Mode
from llmc.errors import ConfigError

BASELINE = "transformers"


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
    baseline_hf: bool = False
    rounds: int = 3
    warmup: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.levels and self.quantizations and self.batches and self.threads):
            raise ConfigError("--levels, --quantization, --batch and --threads each name at least one value")
        if min(*self.batches, *self.threads) < 1:
            raise ConfigError("--batch and --threads: numbers from 1 on")
        named: dict[str, tuple[object, ...]] = {"--levels": self.levels, "--quantization": self.quantizations}
        for flag, values in {**named, "--batch": self.batches, "--threads": self.threads}.items():
            if len(set(values)) < len(values):
                raise ConfigError(f"{flag} {','.join(map(str, values))}: name each once")
        refuse_unknown("optimization_level", self.levels)
        refuse_unknown("quantization", [scheme for scheme in self.quantizations if scheme != "none"])


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One combination: tokens per second that each sequence gets, and that all get together."""

    name: str
    each: Figure
    together: Figure


def bench_sweep(config: SweepConfig, say: Say) -> BenchResult:
    """Compile each variant once, then measure all combinations in turns.

    Raises:
        ConfigError: a variant does not compile, or has no room for what is asked.
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
        modes = [
            Mode(name=str(batch), batch=batch, prompt_tokens=config.prompt_tokens, new_tokens=config.new_tokens) for batch in config.batches
        ]
        for one in artifacts.values():
            refuse_longer(modes[0], one.manifest.limits)
            if max(config.batches) > one.manifest.limits.max_num_seqs:
                raise ConfigError(f"--batch {max(config.batches)}: {one.name} runs {one.manifest.limits.max_num_seqs} sequences at once")
        return summarised(config, _measure(config, artifacts, modes, say))


def _measure(config: SweepConfig, artifacts: Mapping[str, Compiled], modes: Sequence[Mode], say: Say) -> list[Measured]:
    """All combinations in turns, `rounds` times, each engine in a process of its own per round and number of threads."""
    samples: dict[str, tuple[list[float], list[float]]] = {}
    dtype = next(iter(artifacts.values())).manifest.model.dtype
    for number in range(config.rounds):
        say(f"round {number + 1} of {config.rounds}")
        options: dict[str, int] = {"warmup": config.warmup, "repeats": 1, "seed": config.seed + 1000 * number}
        for threads in config.threads:
            found = {name: engine_rows(one.artifact, modes, threads=threads, **options)["modes"] for name, one in artifacts.items()}
            if config.baseline_hf:
                found[BASELINE] = hf_rows(config.model, dtype, modes, threads=threads, **options)["modes"]
            of_threads = f", {threads} thread{'s' * (threads > 1)}" if len(config.threads) > 1 else ""
            for (name, rows), mode in itertools.product(found.items(), modes):
                (row,) = rows[mode.name]
                each, together = samples.setdefault(f"{name}, batch {mode.batch}{of_threads}", ([], []))
                each.append(1e3 / statistics.fmean(row["step_ms"]))
                together.append(row["decode_tok_s"])
    return [Measured(name=name, each=figure(e), together=figure(t)) for name, (e, t) in samples.items()]


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
    names = ("levels", "quantizations", "batches", "threads", "prompt_tokens", "new_tokens", "baseline_hf", "rounds", "warmup", "seed")
    notes = ["Unbeaten, by the medians: no other combination is as fast or faster in both columns."]
    return BenchResult(
        benchmark="sweep",
        workload={"model": str(config.model), **{name: getattr(config, name) for name in names}},
        tables=[Table(title=f"{config.model}: sweep", columns=columns, rows=rows, notes=notes)],
        charts=[chart],
    )
