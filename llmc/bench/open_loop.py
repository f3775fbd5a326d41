"""`llmc bench serve`: requests that arrive when they arrive, whether or not the server has answered the ones before.

Arrivals are Poisson with a seed: the gaps are exponential with mean 1 / rate. A request whose turn comes while `max_in_flight` are
open waits here, which is counted and reported as late: then the client, not the server, was the limit.
"""

from __future__ import annotations

import itertools
import math
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmc.bench.contenders import STARTUP_PROMPT, Say
from llmc.bench.figure import figure, percentile
from llmc.bench.openai_client import connect, first_token_seconds, served_model, stream_completion
from llmc.bench.processes import RunningServer, serve_command, server
from llmc.bench.result import BenchResult, Cell, Chart, Column, Gate, Point, Table, at_least, at_most
from llmc.errors import ConfigError

_LATE_S = 0.05
# Common words, so that any tokenizer makes about one token of each.
_TEXT = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not what all were we "
    "when your can said there use an each which she do how their if will up other about out many then them these so some her would make "
    "like him into time has look two more write go see number no way could people my than first water been call who oil its now find long"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """What is sent to which server. Exactly one of `artifact`, which is served for the time of the run, and `base_url`."""

    artifact: Path | None = None
    base_url: str | None = None
    model: str | None = None  # None: the first the server lists
    rate: float = 4.0  # requests per second
    num_requests: int = 64
    prompt_words: int = 96
    new_tokens: int = 32
    ignore_eos: bool = True
    max_in_flight: int = 256
    warmup: int = 2  # requests sent before, one after the other, and not counted
    threads: int = 1
    seed: int = 0
    timeout_s: float = 600.0
    goodput: tuple[tuple[str, float], ...] = ()  # ("ttft", ms), ("itl", ms), ("e2e", ms): bounds a good request keeps
    max_p99_ttft_ms: float | None = None
    min_goodput: float | None = None  # good requests per second

    def __post_init__(self) -> None:
        if (self.artifact is None) == (self.base_url is None):
            raise ConfigError("name an ARTIFACT to serve, or a running server with --base-url; one of them")
        if self.base_url is not None:
            connect(self.base_url, timeout_s=1.0)  # opens nothing yet: judges the address
        if not 0 < self.rate < math.inf:
            raise ConfigError(f"--rate {self.rate:g}: requests per second, above 0")
        if unknown := [name for name, _ in self.goodput if name not in ("ttft", "itl", "e2e")]:
            raise ConfigError(f"--goodput {unknown[0]}: accepted are ttft, itl and e2e, each with milliseconds, as in ttft:200")
        if wrong := [f"{name}:{bound:g}" for name, bound in self.goodput if not 0 <= bound < math.inf]:
            raise ConfigError(f"--goodput {wrong[0]}: expected milliseconds, a number from 0 on")
        if self.min_goodput is not None and not self.goodput:
            raise ConfigError("--min-goodput counts requests that keep bounds; give the bounds with --goodput")


@dataclass
class Answer:
    """One request's fate. Written by its own thread alone. Times in seconds; `due` and `sent` from the start of the run."""

    due: float
    sent: float = 0.0
    ttft: float | None = None
    gaps: list[float] = field(default_factory=list)
    ended: float | None = None
    tokens: int = 0
    error: str | None = None

    @property
    def e2e(self) -> float | None:
        """From the moment it was due: waiting in this client counts, or a stalled server would look better than it is."""
        return None if self.ended is None else self.ended - self.due


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds from the start, rising: a Poisson process."""
    rng = random.Random(f"arrivals/{seed}")
    return list(itertools.accumulate(rng.expovariate(rate) for _ in range(count)))


def prompt_of(seed: int, number: int, words: int) -> str:
    """Words in an order of its own per request, so that no prefix cache helps."""
    rng = random.Random(f"prompt/{seed}/{number}")
    return " ".join(rng.choice(_WORDS) for _ in range(words))


def bench_serve(config: LoadConfig, say: Say) -> BenchResult:
    """Send `num_requests` and tell what became of each.

    Raises:
        ConfigError: no server answers, or every request failed.
    """
    with tempfile.TemporaryDirectory(prefix="llmc-bench-") as folder:
        running: AbstractContextManager[RunningServer | None] = nullcontext()
        if config.artifact is not None:
            say(f"serve {config.artifact}")
            running = server(serve_command(config.artifact, threads=config.threads), Path(folder) / "log")
        with running as own:
            if own is not None:
                first_token_seconds(own, {"model": "bench", "prompt": list(STARTUP_PROMPT), "max_tokens": 1})
            base_url = own.base_url if own is not None else str(config.base_url)
            model = config.model or served_model(base_url)
            for number in range(config.warmup):
                failed = _ask(base_url, _body(config, model, -1 - number), Answer(due=0.0), time.perf_counter(), config.timeout_s).error
                if failed is not None:
                    raise ConfigError(f"{base_url} refuses the first request: {failed}")
            say(f"{config.num_requests} requests at {config.rate:g} per second")
            answers = run_load(config, base_url, model)
    if all(answer.error is not None for answer in answers):
        raise ConfigError(f"every request failed; the first: {answers[0].error}")
    return summarised(config, base_url if own is None else "llmc serve", model, answers)


def run_load(config: LoadConfig, base_url: str, model: str) -> list[Answer]:
    """All requests, each in a thread of its own that starts when it is due; returns when the last has ended."""
    answers = [Answer(due=due) for due in arrivals(config.rate, config.num_requests, config.seed)]
    bodies = [_body(config, model, number) for number in range(config.num_requests)]
    places = threading.Semaphore(config.max_in_flight)
    started = time.perf_counter()

    def one(answer: Answer, body: dict[str, Any]) -> None:
        with places:
            _ask(base_url, body, answer, started, config.timeout_s)

    workers = []
    for answer, body in zip(answers, bodies, strict=True):
        time.sleep(max(0.0, started + answer.due - time.perf_counter()))
        workers.append(threading.Thread(target=one, args=(answer, body), daemon=True))
        workers[-1].start()
    for running in workers:
        running.join()
    return answers


def _body(config: LoadConfig, model: str, number: int) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "prompt": prompt_of(config.seed, number, config.prompt_words), "temperature": 0}
    body |= {"max_tokens": config.new_tokens, "stream_options": {"include_usage": True}}
    return body | ({"ignore_eos": True} if config.ignore_eos else {})


def _ask(base_url: str, body: dict[str, Any], answer: Answer, started: float, timeout_s: float) -> Answer:
    answer.sent = time.perf_counter() - started
    last = None
    try:
        for arrival, event in stream_completion(base_url, body, timeout_s=timeout_s):
            if event.get("choices"):
                if last is None:
                    answer.ttft = arrival - started - answer.due
                else:
                    answer.gaps.append(arrival - last)
                last = arrival
            if event.get("usage"):
                answer.tokens = int(event["usage"].get("completion_tokens", 0))
        if last is None:
            raise OSError("an answer without a token")
        answer.ended = last - started
        answer.tokens = answer.tokens or len(answer.gaps) + 1
    except OSError as error:
        answer.error = str(error) or type(error).__name__
    return answer


def summarised(config: LoadConfig, where: str, model: str, answers: Sequence[Answer]) -> BenchResult:
    """The table of a run. At least one request succeeded."""
    done = [answer for answer in answers if answer.error is None]
    span = max(answer.ended or 0.0 for answer in done)
    lasting = {
        "ttft": [1e3 * answer.ttft for answer in done if answer.ttft is not None],
        "itl": [1e3 * gap for answer in done for gap in answer.gaps],
        "e2e": [1e3 * answer.e2e for answer in done if answer.e2e is not None],
    }
    titles = {"ttft": "first token (TTFT)", "itl": "between tokens (ITL)", "e2e": "whole answer"}
    columns = [Column(key="what", title="latency"), *(Column(key=f"p{p}", title=f"p{p}", unit="ms", digits=1) for p in (50, 90, 99))]
    rows: list[dict[str, Cell]] = []
    for name, values in lasting.items():
        if values:
            tails: dict[str, Cell] = {f"p{p}": percentile(values, p / 100) for p in (90, 99)}
            # gaps of one answer follow each other, so they are no independent samples, and their median has no such interval
            rows.append({"what": titles[name], "p50": percentile(values, 0.5) if name == "itl" else figure(values), **tails})
    good = sum(_is_good(answer, dict(config.goodput)) for answer in done)
    counts = {
        "requests answered": len(done),
        "failed": len(answers) - len(done),
        "sent late by this client": sum(answer.sent - answer.due > _LATE_S for answer in answers),
        "requests per second": len(done) / span,
        "generated tokens per second": sum(answer.tokens for answer in done) / span,
    }
    if config.goodput:
        bounds = ", ".join(f"{name} {bound:g} ms" for name, bound in config.goodput)
        counts |= {f"good requests ({bounds})": good, "goodput, requests per second": good / span}
    errors = sorted({answer.error for answer in answers if answer.error is not None})
    tables = [
        Table(title=f"{where}: {model}, {config.rate:g} requests per second offered", columns=columns, rows=rows),
        Table(
            title="Counts",
            columns=[Column(key="what", title="what"), Column(key="value", title="value", digits=2)],
            rows=[{"what": name, "value": value} for name, value in counts.items()],
            notes=[f"error: {error[:200]}" for error in errors[:5]],
        ),
    ]
    gates: list[Gate] = [
        *at_most("--max-p99-ttft", config.max_p99_ttft_ms, percentile(lasting["ttft"], 0.99)),
        *at_least("--min-goodput", config.min_goodput, good / span),
    ]
    workload = {name: getattr(config, name) for name in config.__dataclass_fields__ if name not in ("max_p99_ttft_ms", "min_goodput")}
    workload |= {"model": model, "goodput": [f"{name}:{bound:g}" for name, bound in config.goodput]}
    workload |= {name: str(value) for name, value in workload.items() if isinstance(value, Path)}
    chart = Chart(
        title="Time to the first token over the run",
        x_title="request due, s",
        y_title="TTFT, ms",
        points=[Point(x=answer.due, y=1e3 * (answer.ttft or 0.0), label="") for answer in done],
    )
    return BenchResult(
        benchmark="serve",
        workload={name: value for name, value in workload.items() if value is not None},
        tables=tables,
        charts=[chart],
        gates=gates,
        details={"requests": [{"due": a.due, "sent": a.sent, "ttft": a.ttft, "e2e": a.e2e, "error": a.error} for a in answers]},
    )


def _is_good(answer: Answer, bounds: dict[str, float]) -> bool:
    measured = {"ttft": answer.ttft, "e2e": answer.e2e, "itl": max(answer.gaps, default=0.0)}
    return all(value is not None and 1e3 * value <= bounds.get(name, float("inf")) for name, value in measured.items())
