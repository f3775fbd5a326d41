"""`llmc bench latency`, `throughput` and `startup`: one artifact on this machine, Hugging Face beside it if asked."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.bench.contenders import (
    STARTUP_PROMPT,
    Say,
    cold_start,
    engine_rows,
    hf_cold_start,
    hf_rows,
    opened,
    refuse_longer,
    refuse_other_model,
)
from llmc.bench.figure import Figure, figure, ratios
from llmc.bench.result import BenchResult, Cell, Column, Table, at_least, at_most
from llmc.bench.workload import Mode
from llmc.errors import ConfigError

BASELINE = "transformers"


@dataclass(frozen=True, kw_only=True)
class SingleConfig:
    """One artifact and, for the baseline, the model folder it was compiled from."""

    artifact: Path
    baseline_model: Path | None = None
    batch: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 64
    rounds: int = 5
    warmup: int = 1
    threads: int = 1
    seed: int = 0
    min_speedup: float | None = None
    max_cold_start_s: float | None = None

    def __post_init__(self) -> None:
        if self.min_speedup is not None and self.baseline_model is None:
            raise ConfigError("--min-speedup compares with a baseline; add --baseline hf --model DIR")

    def workload(self, **more: Any) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("batch", "prompt_tokens", "new_tokens", "rounds", "warmup", "threads", "seed")}
        return {"artifact": str(self.artifact), **plain, **more}


def bench_latency(config: SingleConfig, say: Say) -> BenchResult:
    """How long `batch` sequences take together: to the first token, between tokens, in all."""
    rows = _in_turns(config, say)
    table_rows: list[dict[str, Cell]] = []
    for name, found in rows.items():
        table_rows.append(
            {
                "engine": name,
                "ttft": figure([1e3 * row["prefill_s"] for row in found]),
                "tpot": figure([statistics.fmean(row["step_ms"]) for row in found]),
                "itl_p99": figure([_worst(row["step_ms"]) for row in found]),
                "total": figure([1e3 * row["total_s"] for row in found]),
            }
        )
    columns = [
        Column(key="engine", title="engine"),
        Column(key="ttft", title="first token", unit="ms", better="lower", digits=2),
        Column(key="tpot", title="per further token", unit="ms", better="lower", digits=3),
        Column(key="itl_p99", title="slowest step in 100", unit="ms", better="lower", digits=3),
        Column(key="total", title="all tokens", unit="ms", better="lower"),
    ]
    speed = {name: figure([1 / row["total_s"] for row in found]) for name, found in rows.items()}
    return _finished("latency", config, [Table(title=f"{config.artifact}: latency", columns=columns, rows=table_rows)], speed)


def bench_throughput(config: SingleConfig, say: Say) -> BenchResult:
    """Tokens per second of `batch` sequences that are all there from the start, continuous batching included."""
    rows = _in_turns(config, say)
    both = config.batch * (config.prompt_tokens + config.new_tokens)
    speed = {name: figure([config.batch * config.new_tokens / row["total_s"] for row in found]) for name, found in rows.items()}
    table_rows: list[dict[str, Cell]] = [
        {"engine": name, "output": speed[name], "total": figure([both / row["total_s"] for row in found])} for name, found in rows.items()
    ]
    columns = [
        Column(key="engine", title="engine"),
        Column(key="output", title="generated", unit="tok/s", better="higher"),
        Column(key="total", title="prompt and generated", unit="tok/s", better="higher"),
    ]
    return _finished("throughput", config, [Table(title=f"{config.artifact}: throughput", columns=columns, rows=table_rows)], speed)


def bench_startup(config: SingleConfig, say: Say) -> BenchResult:
    """From the spawn of `llmc serve` to the first token over HTTP, the page cache warm; and where the time goes."""
    found = opened("llmc", config.artifact)
    if found.manifest.tokenizer.tokenizer_json is None:
        raise ConfigError(f"{config.artifact}: has no tokenizer, so `llmc serve` cannot start it; compile with --tokenizer DIR")
    if config.baseline_model is not None:
        refuse_other_model(config.baseline_model, found.manifest)
    for _ in range(max(1, config.warmup)):  # brings code, too, into the page cache
        cold_start(config.artifact, threads=config.threads)
    starts, theirs = [], []
    for number in range(config.rounds):
        say(f"round {number + 1} of {config.rounds}")
        starts.append(cold_start(config.artifact, threads=config.threads))
        if config.baseline_model is not None:
            theirs.append(hf_cold_start(config.baseline_model, found.manifest.model.dtype, threads=config.threads))
    rows: list[dict[str, Cell]] = [
        {"engine": "llmc serve", "seconds": figure([s.seconds for s in starts]), "pss": figure([s.pss_bytes / 1e6 for s in starts])}
    ]
    if theirs:
        name = f"{BASELINE}, no server"
        rows.append({"engine": name, "seconds": figure([s for s, _ in theirs]), "pss": figure([used / 1e6 for _, used in theirs])})
    columns = [
        Column(key="engine", title="engine"),
        Column(key="seconds", title="start to first token", unit="s", better="lower", digits=3),
        Column(key="pss", title="memory, PSS", unit="MB", better="lower", digits=0),
    ]
    names = [name for name in starts[0].stages_ms if all(name in start.stages_ms for start in starts)]
    stages: list[dict[str, Cell]] = [{"stage": name, "ms": figure([start.stages_ms[name] for start in starts])} for name in names]
    tables = [
        Table(title=f"{config.artifact}: cold start", columns=columns, rows=rows),
        Table(
            title="Where the start goes",
            columns=[Column(key="stage", title="stage"), Column(key="ms", title="time", unit="ms", better="lower")],
            rows=stages,
            notes=["The front and the engine process start side by side; stages named a.b run inside stage a."],
        ),
    ]
    seconds = figure([start.seconds for start in starts])
    gates = at_most("--max-cold-start", config.max_cold_start_s, seconds.median)
    if theirs:
        gates += at_least("--min-speedup", config.min_speedup, ratios(figure([s for s, _ in theirs]), seconds).median)
    repeats = {"rounds": config.rounds, "warmup": max(1, config.warmup), "threads": config.threads}
    prompt = {"prompt_token_ids": list(STARTUP_PROMPT), "new_tokens": 1, "seed": "none is drawn from: the prompt is always this one"}
    return BenchResult(benchmark="startup", workload={"artifact": str(config.artifact), **repeats, **prompt}, tables=tables, gates=gates)


def _in_turns(config: SingleConfig, say: Say) -> dict[str, list[dict[str, Any]]]:
    """Rows of the engine and of the baseline, one per round, alternating, every one in a fresh process."""
    manifest = opened("llmc", config.artifact).manifest
    mode = Mode(name="work", batch=config.batch, prompt_tokens=config.prompt_tokens, new_tokens=config.new_tokens)
    refuse_longer(mode, manifest.limits)
    if config.baseline_model is not None:
        refuse_other_model(config.baseline_model, manifest)
    rows: dict[str, list[dict[str, Any]]] = {"llmc": []}
    for number in range(config.rounds):
        say(f"round {number + 1} of {config.rounds}")
        options: dict[str, int] = {"threads": config.threads, "warmup": config.warmup, "repeats": 1, "seed": config.seed + 1000 * number}
        rows["llmc"] += engine_rows(config.artifact, [mode], **options)["modes"]["work"]
        if config.baseline_model is not None:
            found = hf_rows(config.baseline_model, manifest.model.dtype, [mode], **options)["modes"]["work"]
            rows.setdefault(BASELINE, []).extend(found)
    return rows


def _finished(name: str, config: SingleConfig, tables: Sequence[Table], speed: Mapping[str, Figure]) -> BenchResult:
    gates = []
    if BASELINE in speed:
        gain = ratios(speed["llmc"], speed[BASELINE])
        gates = at_least("--min-speedup", config.min_speedup, gain.median)
        column = Column(key="ratio", title="llmc against transformers", unit="x", better="higher", digits=2)
        tables = [*tables, Table(title="Ratio, round by round", columns=[column], rows=[{"ratio": gain}])]
    return BenchResult(benchmark=name, workload=config.workload(), tables=tables, gates=gates)


def _worst(steps: Sequence[float]) -> float:
    ordered = sorted(steps)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
