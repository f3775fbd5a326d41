"""`llmc bench`: measurements of levels, artifacts, servers and kernels."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import rich_click as click

from llmc.errors import ConfigError

if TYPE_CHECKING:
    from llmc.bench.result import BenchResult

_F = TypeVar("_F", bound=Callable[..., Any])
_FOLDER = click.Path(path_type=Path)
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group()
def bench_group() -> None:
    """Measure levels, artifacts, servers and kernels on this machine.

    Every run records commit, machine, versions, seeds, warm-up and repeats. A gate that fails (--max-..., --min-...) ends the command
    with status 6.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _ended)


def _ended(number: int, frame: object) -> None:
    """Leave as an error does: what was started is stopped, temporary folders go."""
    sys.exit(128 + number)


def outputs(command: _F) -> _F:
    """--json, --html."""
    command = click.option("--html", "html_file", type=_FILE, default=None, help="Also write one self-contained page.")(command)
    return click.option("--json", "json_file", type=_FILE, default=None, help="Also write every sample as JSON.")(command)


def repeats(rounds: int, *, seeded: bool = True) -> Callable[[_F], _F]:
    """--rounds, --warmup, --threads and, where prompts are drawn, --seed."""

    def add(command: _F) -> _F:
        for option in (
            *([click.option("--seed", type=int, default=0, show_default=True, help="Of the prompts.")] if seeded else []),
            click.option("--threads", type=click.IntRange(min=1), default=None, help="Threads of a step [default: all processors]."),
            click.option("--warmup", type=click.IntRange(min=0), default=1, show_default=True, help="Runs not counted, per process."),
            click.option("--rounds", type=click.IntRange(min=1), default=rounds, show_default=True, help="Measured, contenders in turns."),
        ):
            command = option(command)
        return command

    return add


_baseline = click.option("--baseline", type=click.Choice(["hf"]), default=None, help="hf: Hugging Face transformers in the same run.")
_min_speedup = click.option("--min-speedup", type=click.FloatRange(min=0), default=None, metavar="X", help="Gate: at least X times.")
_max_cold_start = click.option(
    "--max-cold-start", type=click.FloatRange(min=0), default=None, metavar="SECONDS", help="Gate: start to first token."
)


def processors(threads: int | None) -> int:
    return threads or len(os.sched_getaffinity(0))


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"llmc bench: {text}", file=sys.stderr, flush=True)


def finish(measure: Callable[[], BenchResult], json_file: Path | None, html_file: Path | None) -> int:
    """Measure, show the result, write the files asked for; the exit status. The machine is described as it was before.

    Raises:
        ConfigError: a file could not be written; nothing is measured then.
    """
    from llmc.bench.machine import environment
    from llmc.bench.show import refuse_unwritable, show, write_html, write_json
    from llmc.cli.console import console

    for flag, path in (("--json", json_file), ("--html", html_file)):
        if path is not None:
            refuse_unwritable(flag, path)
    if json_file is not None and html_file is not None and json_file.resolve() == html_file.resolve():
        raise ConfigError(f"--json and --html both name {json_file}; name two files")
    began = environment()
    result = replace(measure(), environment=began)
    show(result, console())
    if json_file is not None:
        write_json(result, json_file)
    if html_file is not None:
        write_html(result, html_file)
    return result.exit_code


@bench_group.command("levels")
@click.argument("model", type=_FOLDER)
@click.option("--levels", default=None, metavar="0,2", help="Optimisation levels, rising [default: all that are built].")
@click.option("--quantization", default="", metavar="int8,int4", help="One more row each, at the highest level below -O3.")
@click.option("--performance-mode", default="", metavar="interactivity,throughput", help="One more row each, likewise.")
@click.option("--compile-option", multiple=True, metavar="FLAG", help="For every compile, such as --compile-option=--dtype=float32.")
@click.option("--passes", is_flag=True, help="Measure each pass's gain: the highest level below -O3 with the pass left out.")
@click.option("--tvm/--no-tvm", default=True, show_default=True, help="One more row: compiled with --backend tvm.")
@click.option("--startup/--no-startup", default=True, show_default=True, help="Start `llmc serve` in every round.")
@_baseline
@repeats(5)
@_max_cold_start
@_min_speedup
@click.option("--max-kl", type=click.FloatRange(min=0), default=None, metavar="NATS", help="Gate: mean KL of every row from -O0.")
@outputs
def levels_command(
    model: Path,
    levels: str | None,
    quantization: str,
    performance_mode: str,
    compile_option: tuple[str, ...],
    passes: bool,
    tvm: bool,
    startup: bool,
    baseline: str | None,
    rounds: int,
    warmup: int,
    threads: int | None,
    seed: int,
    max_cold_start: float | None,
    min_speedup: float | None,
    max_kl: float | None,
    json_file: Path | None,
    html_file: Path | None,
) -> int:
    """Compile the folder MODEL at every level and show speed, start-up, memory, compile time, size and divergence side by side."""
    from llmc.bench.levels import LevelsConfig, bench_levels

    config = LevelsConfig(
        model=model,
        levels=tuple(numbers("--levels", levels)) if levels is not None else built_levels(),
        quantizations=tuple(words(quantization)),
        performance_modes=tuple(words(performance_mode)),
        compile_options=compile_option,
        passes=passes,
        tvm=tvm,
        baseline_hf=baseline == "hf",
        rounds=rounds,
        warmup=warmup,
        threads=processors(threads),
        seed=seed,
        startup=startup,
        max_cold_start_s=max_cold_start,
        min_speedup=min_speedup,
        max_kl=max_kl,
    )
    return finish(lambda: bench_levels(config, say), json_file, html_file)


def built_levels() -> tuple[int, ...]:
    """Every optimisation level of this llmc."""
    from llmc.compiler.pipeline import LEVELS

    return LEVELS


def words(text: str) -> list[str]:
    return [part for part in text.replace(" ", ",").split(",") if part]


def numbers(flag: str, text: str) -> list[int]:
    """Comma-separated integers.

    Raises:
        ConfigError: something else.
    """
    try:
        return [int(part) for part in words(text)]
    except ValueError:
        raise ConfigError(f"{flag} {text!r}: expected integers with commas between them, such as 0,1,2") from None


def single(command: str, *, rounds: int, seeded: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """What `latency`, `throughput` and `startup` share: ARTIFACT, the baseline, repeats, outputs."""

    def add(function: Callable[..., Any]) -> Any:
        function = outputs(function)
        function = _min_speedup(function)
        function = repeats(rounds, seeded=seeded)(function)
        function = click.option("--model", type=_FOLDER, default=None, help="The folder ARTIFACT was compiled from, for the baseline.")(
            function
        )
        function = _baseline(function)
        function = click.argument("artifact", type=_FOLDER)(function)
        return bench_group.command(command)(function)

    return add


def sizes(batch: int, prompt_tokens: int, new_tokens: int) -> Callable[[_F], _F]:
    """--batch, --input-len, --output-len."""

    def add(command: _F) -> _F:
        for name, default, text in (
            ("--output-len", new_tokens, "New tokens of each."),
            ("--input-len", prompt_tokens, "Tokens of each prompt."),
            ("--batch", batch, "Sequences at once."),
        ):
            command = click.option(
                name, type=click.IntRange(min=2 if name == "--output-len" else 1), default=default, show_default=True, help=text
            )(command)
        return command

    return add


def _single(baseline: str | None, model: Path | None, threads: int | None, **fields: Any) -> Any:
    """The configuration of one artifact's benchmark."""
    from llmc.bench.single import SingleConfig

    if (baseline is None) != (model is None):
        raise ConfigError("--baseline hf runs the model folder that --model names; give both, or neither")
    return SingleConfig(baseline_model=model, threads=processors(threads), **fields)


@single("latency", rounds=10)
@sizes(1, 128, 64)
def latency_command(input_len: int, output_len: int, json_file: Path | None, html_file: Path | None, **options: Any) -> int:
    """Time ARTIFACT in this machine's hands: first token, further tokens, slowest steps, all."""
    from llmc.bench.single import bench_latency

    config = _single(prompt_tokens=input_len, new_tokens=output_len, **options)
    return finish(lambda: bench_latency(config, say), json_file, html_file)


@single("throughput", rounds=5)
@sizes(64, 128, 64)
def throughput_command(input_len: int, output_len: int, json_file: Path | None, html_file: Path | None, **options: Any) -> int:
    """Tokens per second of many sequences in ARTIFACT at once, without a server."""
    from llmc.bench.single import bench_throughput

    config = _single(prompt_tokens=input_len, new_tokens=output_len, **options)
    return finish(lambda: bench_throughput(config, say), json_file, html_file)


@single("startup", rounds=7, seeded=False)
@_max_cold_start
def startup_command(max_cold_start: float | None, json_file: Path | None, html_file: Path | None, **options: Any) -> int:
    """Start `llmc serve ARTIFACT` again and again: seconds to the first token, memory, and where the time goes."""
    from llmc.bench.single import bench_startup

    return finish(lambda: bench_startup(_single(max_cold_start_s=max_cold_start, **options), say), json_file, html_file)


@bench_group.command("serve")
@click.argument("artifact", type=_FOLDER, required=False)
@click.option("--base-url", default=None, metavar="URL", help="A running OpenAI-compatible server; its key in OPENAI_API_KEY.")
@click.option("--model", default=None, help="Name of the model there [default: the first it lists].")
@click.option("--rate", type=float, default=4.0, show_default=True, help="Requests per second, arriving at random times (Poisson).")
@click.option("--num-requests", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--prompt-words", type=click.IntRange(min=1), default=96, show_default=True, help="About as many tokens.")
@click.option("--output-len", type=click.IntRange(min=1), default=32, show_default=True, help="New tokens of each answer.")
@click.option(
    "--ignore-eos/--no-ignore-eos", default=True, show_default=True, help="--no-ignore-eos for servers that do not know the field."
)
@click.option("--max-in-flight", type=click.IntRange(min=1), default=256, show_default=True, help="Requests open at once.")
@click.option("--warmup", type=click.IntRange(min=0), default=2, show_default=True, help="Requests before, not counted.")
@click.option("--threads", type=click.IntRange(min=1), default=None, help="Of the server started for ARTIFACT [default: all processors].")
@click.option("--seed", type=int, default=0, show_default=True, help="Of arrivals and prompts.")
@click.option("--goodput", multiple=True, metavar="NAME:MS", help="A bound that good requests keep: ttft:200, itl:50, e2e:2000.")
@click.option("--max-p99-ttft", type=click.FloatRange(min=0), default=None, metavar="MS", help="Gate.")
@click.option("--min-goodput", type=click.FloatRange(min=0), default=None, metavar="RATE", help="Gate: good requests per second.")
@outputs
def serve_command(
    output_len: int,
    threads: int | None,
    goodput: tuple[str, ...],
    max_p99_ttft: float | None,
    json_file: Path | None,
    html_file: Path | None,
    **options: Any,
) -> int:
    """Send requests at random times to a running server, or to `llmc serve ARTIFACT`, and time every token.

    Open loop: a request is sent when it is due, whether or not earlier ones are answered, as users do. Latency counts from then.
    """
    from llmc.bench.open_loop import LoadConfig, bench_serve

    config = LoadConfig(
        new_tokens=output_len,
        threads=processors(threads),
        goodput=tuple(bound(text) for text in goodput),
        max_p99_ttft_ms=max_p99_ttft,
        **options,
    )
    return finish(lambda: bench_serve(config, say), json_file, html_file)


def bound(text: str) -> tuple[str, float]:
    """ "ttft:200" as a name and milliseconds.

    Raises:
        ConfigError: something else.
    """
    name, _, value = text.partition(":")
    try:
        return name, float(value)
    except ValueError:
        raise ConfigError(f"--goodput {text!r}: expected a name and milliseconds, such as ttft:200") from None


@bench_group.command("kernels")
@click.argument("artifact", type=_FOLDER)
@click.option("--rows", default=None, help="Tokens of a step: up to 64 decoding sequences, more one prompt [default: 1,8,512].")
@click.option("--context", type=click.IntRange(min=1), default=None, help="Tokens of each decoding sequence [default: 512].")
@click.option("--seconds", type=click.FloatRange(min=0.01), default=1.0, show_default=True, help="Per kernel and number of rows.")
@click.option(
    "--megabytes", type=click.IntRange(min=1), default=256, show_default=True, help="Of distinct weights, more than the caches hold."
)
@click.option("--threads", type=click.IntRange(min=1), default=None, help="[default: all processors]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of activations, weights and the experts that are chosen.")
@outputs
def kernels_command(
    artifact: Path,
    rows: str | None,
    context: int | None,
    seconds: float,
    megabytes: int,
    threads: int | None,
    seed: int,
    json_file: Path | None,
    html_file: Path | None,
) -> int:
    """Time the CPU kernels of ARTIFACT on its own shapes, against what this machine can read and compute at most (roofline)."""
    from llmc.bench.kernels import KernelsConfig, bench_kernels

    config = KernelsConfig(
        artifact=artifact,
        rows=tuple(numbers("--rows", rows)) if rows is not None else None,
        context=context,
        seconds=seconds,
        megabytes=megabytes,
        threads=processors(threads),
        seed=seed,
    )
    return finish(lambda: bench_kernels(config, say), json_file, html_file)


@bench_group.command("sweep")
@click.argument("model", type=_FOLDER)
@click.option("--levels", default="2", show_default=True, help="Optimisation levels.")
@click.option("--quantization", default="none", show_default=True, metavar="none,int8", help="Schemes; none: weights as they are.")
@click.option("--batch", default="1,2,4,8", show_default=True, help="Sequences at once.")
@click.option("--threads", default=None, help="Numbers of threads [default: all processors].")
@click.option("--input-len", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--output-len", type=click.IntRange(min=3), default=64, show_default=True)
@_baseline
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--warmup", type=click.IntRange(min=0), default=1, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@outputs
def sweep_command(
    model: Path,
    levels: str,
    quantization: str,
    batch: str,
    threads: str | None,
    input_len: int,
    output_len: int,
    baseline: str | None,
    rounds: int,
    warmup: int,
    seed: int,
    json_file: Path | None,
    html_file: Path | None,
) -> int:
    """Measure every combination for the folder MODEL: what each sequence gets against what all get, and which no other beats (Pareto)."""
    from llmc.bench.sweep import SweepConfig, bench_sweep

    config = SweepConfig(
        model=model,
        levels=tuple(numbers("--levels", levels)),
        quantizations=tuple(words(quantization)),
        batches=tuple(numbers("--batch", batch)),
        threads=tuple(numbers("--threads", threads)) if threads is not None else (processors(None),),
        prompt_tokens=input_len,
        new_tokens=output_len,
        baseline_hf=baseline == "hf",
        rounds=rounds,
        warmup=warmup,
        seed=seed,
    )
    return finish(lambda: bench_sweep(config, say), json_file, html_file)
