"""`llmc bench levels`: the optimisation levels of one model side by side, Hugging Face beside them if asked."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmc.bench.contenders import (
    Compiled,
    Say,
    Variant,
    cold_start,
    compile_variant,
    engine_rows,
    hf_cold_start,
    hf_rows,
    refuse_unknown,
)
from llmc.bench.divergence import Divergence, divergences, forced_tokens
from llmc.bench.figure import Figure, figure, ratios
from llmc.bench.result import BenchResult, Cell, Column, Gate, Table, at_least, at_most
from llmc.bench.workload import DECODE_1, DECODE_8, MANY, PREFILL, Mode
from llmc.errors import ConfigError

BASELINE = "transformers"
SEARCHED = 3  # the level that measures passes while it compiles
SPEEDS = {"prefill": PREFILL, "decode 1": DECODE_1, "decode 8": DECODE_8}


@dataclass(frozen=True, kw_only=True)
class LevelsConfig:
    """What `llmc bench levels` was asked for."""

    model: Path
    levels: tuple[int, ...] = (0, 1, 2)
    quantizations: tuple[str, ...] = ()  # each one more row, at the highest level below -O3
    performance_modes: tuple[str, ...] = ()  # likewise
    compile_options: tuple[str, ...] = ()  # for every variant
    passes: bool = False  # leave each optional pass out in turn
    tvm: bool = True  # one more row: the highest level that TVM compiles, by --backend tvm
    baseline_hf: bool = False
    rounds: int = 5
    warmup: int = 1
    threads: int = 1
    seed: int = 0
    startup: bool = True
    max_cold_start_s: float | None = None
    min_speedup: float | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        if not self.levels or sorted(set(self.levels)) != list(self.levels):
            raise ConfigError(f"--levels {','.join(map(str, self.levels))}: name each level once, in rising order")
        refuse_unknown("optimization_level", self.levels)
        refuse_unknown("quantization", self.quantizations)
        refuse_unknown("performance_mode", self.performance_modes)
        if self.max_cold_start_s is not None and not self.startup:
            raise ConfigError("--max-cold-start bounds what --no-startup does not measure; leave one of them out")
        if self.passes and not any(0 < level < SEARCHED for level in self.levels):
            raise ConfigError("--passes leaves passes of -O1 or -O2 out in turn; name one of these in --levels")


@dataclass
class _Samples:
    """What was measured of one contender, round by round."""

    speeds: dict[str, list[float]] = field(default_factory=dict)
    longest_ms: list[float] = field(default_factory=list)  # the longest step with many sequences
    startup_s: list[float] = field(default_factory=list)
    pss_mb: list[float] = field(default_factory=list)

    def take(self, modes: Mapping[str, Mode], rows: Mapping[str, list[dict[str, Any]]]) -> None:
        for name, mode in modes.items():
            if mode.name == PREFILL.name:
                value = statistics.median(mode.prompt_tokens / row["prefill_s"] for row in rows[name])
            elif mode.name == MANY.name:
                value = statistics.median(mode.batch * mode.new_tokens / row["total_s"] for row in rows[name])
                self.longest_ms.append(statistics.median(row["longest_step_ms"] for row in rows[name]))
            else:
                value = statistics.median(row["decode_tok_s"] for row in rows[name])
            self.speeds.setdefault(name, []).append(value)


def bench_levels(config: LevelsConfig, say: Say) -> BenchResult:
    """Compile every level, then measure all of them in turns, `rounds` times, each in fresh processes.

    Raises:
        ConfigError, UnsupportedModel: a level does not compile.
    """
    with tempfile.TemporaryDirectory(prefix="llmc-bench-") as folder:
        work = Path(folder)
        top = f"-O{config.levels[-1]}"
        compiled = [_compile(config, variant, work, say) for variant in variants(config)]
        by_tvm, lacking = _by_tvm(config, work, say)
        compiled += by_tvm
        if config.passes:
            compiled += _without_each_pass(config, compiled, work, say)
        if config.max_cold_start_s is not None and compiled[0].manifest.tokenizer.tokenizer_json is None:
            raise ConfigError(
                "--max-cold-start: `llmc serve` starts with a tokenizer, and the model has none; add one, or leave the gate out"
            )
        say("logits against -O0")
        apart = _divergences(config, compiled, work, say)
        samples = _measure(config, compiled, say)
        return _result(config, compiled, samples, apart, top, lacking)


def fixed_level(config: LevelsConfig) -> str:
    """What further rows are compiled at: the highest level asked for whose passes are a list. -O3 would search anew for each of them."""
    return f"-O{max((level for level in config.levels if level < SEARCHED), default=config.levels[-1])}"


def variants(config: LevelsConfig) -> list[Variant]:
    """Every level, then the rows beside them."""
    found = [Variant(name=f"-O{level}", options=(f"-O{level}", *config.compile_options)) for level in config.levels]
    base = fixed_level(config)
    for flag, values in (("--quantization", config.quantizations), ("--performance-mode", config.performance_modes)):
        found += [Variant(name=f"{base} {value}", options=(base, flag, value, *config.compile_options)) for value in values]
    return found


def _by_tvm(config: LevelsConfig, work: Path, say: Say) -> tuple[list[Compiled], list[str]]:
    """The row of `--backend tvm`, or a note that says why there is none."""
    level = max((level for level in config.levels if level in (1, 2)), default=None)
    if not config.tvm or level is None:
        return [], []
    if find_spec("tvm") is None:
        return [], ["No row for TVM: apache-tvm is not installed here; pip install 'llmc[tvm]'."]
    variant = Variant(name=f"-O{level} tvm", options=(f"-O{level}", "--backend", "tvm", *config.compile_options))
    try:
        return [_compile(config, variant, work, say)], []
    except ConfigError as error:
        return [], [f"No row for TVM: {error}."]


def _compile(config: LevelsConfig, variant: Variant, work: Path, say: Say) -> Compiled:
    say(f"compile {variant.name}")
    return compile_variant(config.model, variant, work / variant.name.replace(" ", "-").lstrip("-"))


def _without_each_pass(config: LevelsConfig, compiled: Sequence[Compiled], work: Path, say: Say) -> list[Compiled]:
    """The highest level with a list of passes once more without each pass that did something and can be left out."""
    from llmc.config.settings import BY_NAME

    if "passes" not in BY_NAME:
        raise ConfigError("--passes: `llmc compile` cannot leave a pass out yet, so there is nothing to compare")
    base = fixed_level(config)
    full = next(one for one in compiled if one.name == base)
    found = []
    for record in full.manifest.passes:
        if record.matches == 0:
            continue
        variant = Variant(name=f"{base} -{record.name}", options=(base, f"--passes=-{record.name}", *config.compile_options))
        try:
            found.append(_compile(config, variant, work, say))
        except ConfigError as error:
            say(f"{record.name} stays: {error}")  # a pass that the lowering needs
    return found


def _divergences(config: LevelsConfig, compiled: Sequence[Compiled], work: Path, say: Say) -> dict[str, Divergence]:
    oracle = next((one for one in compiled if one.name == "-O0"), None)
    if oracle is None:
        oracle = _compile(config, Variant(name="-O0", options=("-O0", *config.compile_options)), work, say)
    others = {one.name: one.artifact for one in compiled if one.name != "-O0"}
    return divergences(oracle.artifact, others, forced_tokens(oracle.artifact), threads=config.threads, scratch=work)


def _modes(config: LevelsConfig, compiled: Sequence[Compiled]) -> dict[str, Mode]:
    """Performance modes differ in how many sequences and tokens a step takes, so beside them many sequences are measured, too."""
    longest = min(one.manifest.limits.max_model_len for one in compiled)
    speeds = SPEEDS | ({MANY.name: MANY} if config.performance_modes else {})
    return {name: mode.within(longest) for name, mode in speeds.items()}


def _measure(config: LevelsConfig, compiled: Sequence[Compiled], say: Say) -> dict[str, _Samples]:
    modes = _modes(config, compiled)
    samples = {one.name: _Samples() for one in compiled} | ({BASELINE: _Samples()} if config.baseline_hf else {})
    options: dict[str, int] = {"threads": config.threads, "warmup": config.warmup, "repeats": 1}
    dtype = compiled[0].manifest.model.dtype
    for number in range(config.rounds):
        say(f"round {number + 1} of {config.rounds}")
        seed = config.seed + 1000 * number
        turn = number % len(compiled)
        for one in [*compiled[turn:], *compiled[:turn]]:
            found = samples[one.name]
            found.take(modes, engine_rows(one.artifact, list(modes.values()), seed=seed, **options)["modes"])
            if config.startup and one.manifest.tokenizer.tokenizer_json is not None:
                start = cold_start(one.artifact, threads=config.threads)
                found.startup_s.append(start.seconds)
                found.pss_mb.append(start.pss_bytes / 1e6)
        if config.baseline_hf:
            found = samples[BASELINE]
            found.take(modes, hf_rows(config.model, dtype, list(modes.values()), seed=seed, **options)["modes"])
            if config.startup:
                seconds, used = hf_cold_start(config.model, dtype, threads=config.threads)
                found.startup_s.append(seconds)
                found.pss_mb.append(used / 1e6)
    return samples


def _result(
    config: LevelsConfig,
    compiled: Sequence[Compiled],
    samples: Mapping[str, _Samples],
    apart: Mapping[str, Divergence],
    top: str,
    lacking: list[str],
) -> BenchResult:
    modes = _modes(config, compiled)
    baseline = BASELINE if config.baseline_hf else compiled[0].name
    speedups = {
        name: {mode: ratios(figure(found.speeds[mode]), figure(samples[baseline].speeds[mode])) for mode in modes}
        for name, found in samples.items()
    }
    facts = {one.name: one for one in compiled}
    base = fixed_level(config)
    rows = [
        _row(name, found, facts.get(name), apart.get(name), speedups[name]["decode 1"])
        for name, found in samples.items()
        if not name.startswith(_without(base))  # these have a table of their own
    ]
    columns = [
        Column(key="level", title="level"),
        Column(key="prefill", title=f"prefill {modes['prefill'].prompt_tokens}", unit="tok/s", better="higher", digits=0),
        Column(key="decode 1", title="decode, 1 sequence", unit="tok/s", better="higher"),
        Column(key="decode 8", title="decode, 8 sequences", unit="tok/s", better="higher"),
        *(_many_columns(modes[MANY.name]) if MANY.name in modes else []),
        Column(key="speedup", title=f"decode 1 against {baseline}", unit="x", better="higher", digits=2),
        Column(key="startup", title="start to first token", unit="s", better="lower", digits=2),
        Column(key="pss", title="memory, PSS", unit="MB", better="lower", digits=0),
        Column(key="compile", title="compile", unit="s", better="lower"),
        Column(key="size", title="artifact", unit="MB", better="lower"),
        Column(key="code", title="of it code", unit="MB", better="lower", digits=2),
        Column(key="kl", title="mean KL from -O0", unit="nats", better="lower", digits=6),
        Column(key="same_top", title="same best token", unit="%", better="higher"),
    ]
    tables = [Table(title=f"{config.model}: levels", columns=columns, rows=rows, notes=[*_notes(config, compiled), *lacking])]
    if config.passes:
        tables.append(_pass_table(samples, modes, apart, base))
    return BenchResult(
        benchmark="levels",
        workload={
            "model": str(config.model),
            "modes": ", ".join(f"{m.name}: {m.batch} x {m.prompt_tokens} prompt + {m.new_tokens} new tokens" for m in modes.values()),
            "rounds": config.rounds,
            "warmup": config.warmup,
            "threads": config.threads,
            "seed": config.seed,
            "baseline": baseline,
            "compile options": " ".join(config.compile_options) or "none",
        },
        tables=tables,
        gates=_gates(config, samples, speedups, apart, top),
        details={"divergence": {name: {k: getattr(d, k) for k in d.__slots__} for name, d in apart.items()}},
    )


def _many_columns(mode: Mode) -> list[Column]:
    return [
        Column(key=MANY.name, title=f"{mode.batch} sequences at once", unit="tok/s", better="higher"),
        Column(key="longest", title="longest step of these", unit="ms", better="lower"),
    ]


def _row(name: str, found: _Samples, fact: Compiled | None, apart: Divergence | None, speedup: Figure) -> dict[str, Cell]:
    row: dict[str, Cell] = {"level": name, "speedup": speedup}
    row.update({mode: figure(values) for mode, values in found.speeds.items()})
    if found.longest_ms:
        row["longest"] = figure(found.longest_ms)
    if found.startup_s:
        row.update(startup=figure(found.startup_s), pss=figure(found.pss_mb))
    if fact is not None:
        row.update({"compile": fact.compile_s, "size": fact.size_bytes / 1e6, "code": fact.code_bytes / 1e6})
    if apart is not None:
        row.update(kl=apart.mean_kl, same_top=100 * apart.same_top)
    return row


def _without(base: str) -> str:
    """What the name of the level without a pass begins with."""
    return f"{base} -"


def _pass_table(samples: Mapping[str, _Samples], modes: Mapping[str, Mode], apart: Mapping[str, Divergence], base: str) -> Table:
    """What each pass brings and costs: the full level against the level without it."""
    rows: list[dict[str, Cell]] = []
    for name, found in samples.items():
        if name.startswith(_without(base)):
            gains = {mode: ratios(figure(samples[base].speeds[mode]), figure(found.speeds[mode])) for mode in modes}
            rows.append({"pass": name.removeprefix(_without(base)), **gains, "kl": apart[base].mean_kl - apart[name].mean_kl})
    columns = [Column(key=mode, title=mode, unit="x", better="higher", digits=3) for mode in modes]
    columns.append(Column(key="kl", title="mean KL it adds", unit="nats", better="lower", digits=6))
    notes = [
        f"{base} against {base} without the pass, round by round; above 1 the pass pays, an interval that holds 1 says nothing.",
        "KL is from -O0, with the pass less without it: below zero, the program is nearer to -O0 with the pass.",
    ]
    return Table(title="What each pass brings", columns=[Column(key="pass", title="pass"), *columns], rows=rows, notes=notes)


def _notes(config: LevelsConfig, compiled: Sequence[Compiled]) -> list[str]:
    notes = ["Compile times are of one run each, without the compile cache."]
    if config.startup and any(one.manifest.tokenizer.tokenizer_json is None for one in compiled):
        notes.append("No start-up: `llmc serve` needs a tokenizer, and this model has none.")
    return notes


def _gates(
    config: LevelsConfig,
    samples: Mapping[str, _Samples],
    speedups: Mapping[str, Mapping[str, Figure]],
    apart: Mapping[str, Divergence],
    top: str,
) -> list[Gate]:
    """Of the highest level; --max-kl of every row."""
    started = samples[top].startup_s
    return [
        *(at_most("--max-cold-start", config.max_cold_start_s, statistics.median(started)) if started else []),
        *at_least("--min-speedup", config.min_speedup, speedups[top]["decode 1"].median),
        *at_most("--max-kl", config.max_kl, max((found.mean_kl for found in apart.values()), default=0.0)),
    ]
