"""What the host side costs, without a model: the engine's step, the front's streaming, the server's first answer.

    python benchmarks/host.py [--json] [--quick]

- engine: microseconds per step of a real engine (scheduler, batch, runner, sampler, events encoded) at 256 decoding sequences over an
  executor that computes nothing. Its logits are 32 wide: the time of an argmax over a vocabulary belongs to the model. Bar 500.
- front: tokens per second that one front process streams to 256 clients, its engine a program that gives canned tokens at an offered
  rate; client and engine run on the other core. Bars 10,000 at --stream-interval 1 and 20,000 at 4.
- first byte: milliseconds from the start of `llmc serve` (its process) to the first byte of GET /v1/models. Bar 600.

Medians; the machine is part of the figures, which go to benchmarks/results/host.json. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import ROOT, finish

BARS = {"engine_step_us": 500.0, "front_tokens_per_s_1": 10_000.0, "front_tokens_per_s_4": 20_000.0, "first_byte_ms": 600.0}
NUM_SEQS = 256
VOCAB = 32


# --- engine ---------------------------------------------------------------------------------------------------------------


def engine_step_us(num_steps: int) -> dict[str, float]:
    """Microseconds of a step, its parts in one: plan, batch, run of nothing, sample, commit, encode."""
    import msgspec
    import numpy as np

    from llmc.artifacts.manifest import KVFacts, KVGroup
    from llmc.runtime.batch import BatchBuilder
    from llmc.runtime.executors.logits import Logits
    from llmc.runtime.messages import GenerateRequest, SamplingParams
    from llmc.runtime.runner import ModelRunner
    from llmc.runtime.sampler import Sampler
    from llmc.runtime.scheduler import Scheduler, SchedulerConfig
    from llmc.runtime.step import DeviceBatch

    class NullExecutor:
        """Gives the same logits for every row."""

        def __init__(self) -> None:
            self._logits = np.zeros((NUM_SEQS * 64, VOCAB), dtype=np.float32)
            self._logits[:, 7] = 1.0

        def allocate_kv(self, num_blocks: int) -> None:
            """There is none."""

        def run(self, batch: DeviceBatch) -> Logits:
            return Logits(self._logits[: len(batch.logits_indices)])

        def close(self) -> None:
            """It holds nothing."""

    longest = 256 + num_steps * 2
    config = SchedulerConfig(
        max_model_len=longest,
        max_num_seqs=NUM_SEQS,
        max_num_batched_tokens=8192,
        block_size=16,
        num_blocks=NUM_SEQS * (longest // 16 + 2),
        eos_token_ids=frozenset({0}),
    )
    facts = KVFacts(block_size=16, dtype="bfloat16", num_kv_heads=[8], head_dim=[128], groups=[KVGroup(layers=[0], window=0)])
    builder = BatchBuilder(
        block_size=16, num_groups=1, vocab_size=VOCAB, max_num_batched_tokens=8192, max_num_seqs=NUM_SEQS, max_model_len=longest
    )
    scheduler = Scheduler(config, facts)
    runner = ModelRunner(NullExecutor(), Sampler(eos_token_ids=[0], seed=0), builder)
    sampling = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    for index in range(NUM_SEQS):
        prompt = [1 + (index * 31 + position) % (VOCAB - 1) for position in range(64 + index % 61)]
        scheduler.add(GenerateRequest(request_id=f"{index:032x}-0", prompt_token_ids=prompt, sampling=sampling, arrival_time=float(index)))
    encoder = msgspec.msgpack.Encoder()
    running = 0
    while running < NUM_SEQS:  # prefill
        plan = scheduler.plan()
        running = len(plan.sequences) if len(plan.sequences) == plan.num_tokens else 0
        runner.submit(plan)
        scheduler.commit(runner.collect())
    times: list[float] = []
    gc.collect()
    gc.freeze()
    for _ in range(num_steps):
        started = time.perf_counter_ns()
        runner.submit(scheduler.plan())
        encoder.encode(scheduler.commit(runner.collect()))
        times.append((time.perf_counter_ns() - started) / 1e3)
    ordered = sorted(times)
    return {"min": ordered[0], "median": statistics.median(ordered), "p99": ordered[int(len(ordered) * 0.99)]}


# --- the canned engine and the server around it ----------------------------------------------------------------------------


class CannedEngine:
    """An engine that gives every running sequence a token per step, a step each `step_s`; runs in the engine process."""

    def __init__(self, options: dict[str, Any]) -> None:
        from llmc.runtime.messages import EngineReady

        self._step_s: float = options["step_s"]
        self._next_at = 0.0
        self._wanted = options["start_at"]  # sequences that must be there before the first token
        self._left: dict[str, int] = {}
        self._step = 0
        self.ready = EngineReady(
            num_blocks=1 << 16, block_size=16, max_model_len=1 << 16, max_num_seqs=1024, max_num_batched_tokens=8192, startup_ms={}
        )

    def add(self, request: Any) -> None:
        self._left[request.request_id] = request.sampling.max_tokens

    def abort(self, request_id: str, reason: str = "abort") -> list[Any]:
        self._left.pop(request_id, None)
        return []

    def has_work(self) -> bool:
        return bool(self._left)

    def step(self) -> list[Any]:
        from llmc.runtime.messages import TokenEvent

        if len(self._left) < self._wanted:
            time.sleep(0.001)
            return []
        self._wanted = 1
        wait = self._next_at - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        self._next_at = max(self._next_at, time.monotonic() - 0.05) + self._step_s
        self._step += 1
        events = []
        for name, left in list(self._left.items()):
            self._left[name] = left - 1
            if left == 1:
                del self._left[name]
            events.append(TokenEvent(request_id=name, token_ids=[5 + self._step % 200], finish_reason="length" if left == 1 else None))
        return events

    def stats(self) -> Any:
        from llmc.runtime.messages import EngineStats

        return EngineStats(
            step=self._step, time=time.monotonic(), num_running=len(self._left), num_waiting=0, kv_blocks_used=0, kv_blocks_total=1,
            prefix_queries_tokens=0, prefix_hits_tokens=0, num_preemptions=0, prompt_tokens=0, generation_tokens=0,
        )  # fmt: skip

    def close(self) -> None:
        self._left.clear()


def tokenizer_json() -> bytes:
    """A byte-level tokenizer of 256 tokens: decoding costs what it costs with any BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str().encode()


def serve_canned(argument: str, program: str = __file__) -> int:
    """The server process: the real front over the engine that `program --engine` is."""
    from llmc.runtime.server.main import serve
    from llmc.runtime.server.settings import ServerSettings

    options = json.loads(argument)

    def load_model(settings: ServerSettings) -> Any:
        from llmc.runtime.server.served_model import ServedModel
        from llmc.runtime.text import Tokenizer

        return ServedModel(
            names=("canned",), tokenizer=Tokenizer.from_bytes(Path(options["tokenizer"]).read_bytes()), chat_template=None, vocab_size=256,
            generation_defaults={}, fingerprint="fp_canned",
        )  # fmt: skip

    command = (sys.executable, str(Path(program).resolve()), "--engine")
    settings = ServerSettings(artifact="none", port=0, engine=options["engine"], engine_command=command, **options["settings"])
    return serve(settings, load_model=load_model)


class Served:
    """A server process over the canned engine."""

    def __init__(
        self, tokenizer: Path, engine: dict[str, Any], settings: dict[str, Any], core: int | None, *, program: str = __file__
    ) -> None:
        argument = json.dumps({"engine": engine, "settings": settings, "tokenizer": str(tokenizer)})
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, str(Path(program).resolve()), "--serve", argument], stdout=subprocess.DEVNULL, stderr=self.log, cwd=ROOT
        )
        if core is not None:
            os.sched_setaffinity(self.process.pid, {core})
        self.port = self._await_port()

    def _await_port(self) -> int:
        while self.process.poll() is None:
            self.log.seek(0)
            if match := re.search(rb'"event":"listening","url":"http://127.0.0.1:(\d+)"', self.log.read()):
                return int(match[1])
            time.sleep(0.002)
        self.log.seek(0)
        raise SystemExit(f"the server ended with code {self.process.returncode}:\n{self.log.read().decode()}")

    def await_ready(self) -> None:
        while b" 200 " not in self.get("/health/ready").split(b"\r\n")[0]:
            time.sleep(0.02)

    def get(self, path: str) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
            return b"".join(parts)

    def cpu_seconds(self) -> float:
        """Of the front process alone."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def move_engine(self, core: int) -> None:
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            for thread in os.listdir(f"/proc/{child}/task"):
                os.sched_setaffinity(int(thread), {core})

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)
        self.log.close()


# --- front ----------------------------------------------------------------------------------------------------------------


async def _read_streams(port: int, num_tokens: int) -> tuple[float, int]:
    """256 streamed completions at once. Returns seconds from the first token to the last byte, and tokens' characters counted."""
    body = json.dumps({"prompt": "x", "stream": True, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    first_at = 0.0
    num_events = 0

    async def one() -> None:
        nonlocal first_at, num_events
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + body)
        tail = b""
        while not tail.endswith(b"data: [DONE]\n\n\r\n") and b"[DONE]" not in tail:
            part = await reader.read(65536)
            if not part:
                raise SystemExit("the server closed a stream before its end")
            first_at = first_at or time.monotonic()
            num_events += part.count(b'"object":"text_completion"')
            tail = (tail + part)[-64:]
        writer.close()

    await asyncio.gather(*(one() for _ in range(NUM_SEQS)))
    return time.monotonic() - first_at, num_events


def front_rate(tokenizer: Path, interval: int, offered: float, num_tokens: int) -> dict[str, float]:
    """Tokens per second delivered at an offered rate, and what the front's processor time alone would allow."""
    cores = sorted(os.sched_getaffinity(0))
    settings = {"stream_interval": interval, "disable_access_log": True, "disable_log_stats": True, "max_queue": 4096}
    served = Served(tokenizer, {"step_s": NUM_SEQS / offered, "start_at": NUM_SEQS}, settings, cores[0])
    try:
        served.await_ready()
        os.sched_setaffinity(0, {cores[-1]})
        served.move_engine(cores[-1])
        before = served.cpu_seconds()
        seconds, num_events = asyncio.run(_read_streams(served.port, num_tokens))
        cpu = served.cpu_seconds() - before
    finally:
        os.sched_setaffinity(0, cores)
        served.stop()
    total = NUM_SEQS * num_tokens
    return {"offered": offered, "delivered": total / seconds, "tokens_per_front_cpu_s": total / cpu, "events": num_events}


# --- first byte -----------------------------------------------------------------------------------------------------------


def first_byte_ms(tokenizer: Path) -> tuple[float, float]:
    """From the start of the process to the first byte of GET /v1/models: by the clock, and of the front's processor time."""
    served = Served(tokenizer, {"step_s": 0.01, "start_at": 1}, {}, None)
    try:
        with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            if not connection.recv(1):
                raise SystemExit("no answer to GET /v1/models")
        return (time.monotonic() - served.started) * 1000, served.cpu_seconds() * 1000
    finally:
        served.stop()


def measure(*, quick: bool) -> dict[str, Any]:
    """All figures. `quick`: few steps, for a check that the program works."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))  # 256 clients, and a quarter of it for connections
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.json"
        tokenizer.write_bytes(tokenizer_json())
        report: dict[str, Any] = {"bars": BARS, "num_seqs": NUM_SEQS}
        report["engine_step_us"] = engine_step_us(60 if quick else 600)
        starts = [first_byte_ms(tokenizer) for _ in range(1 if quick else 7)]
        report["first_byte_ms"] = [round(wall, 1) for wall, _ in starts]
        report["first_byte_front_cpu_ms"] = [round(cpu, 1) for _, cpu in starts]
        for interval, rates in ((1, (12_000, 20_000, 30_000)), (4, (24_000, 40_000, 60_000))):
            tokens = 40 if quick else 400
            runs = [front_rate(tokenizer, interval, rate, tokens) for rate in (rates[:1] if quick else rates)]
            report[f"front_interval_{interval}"] = [{name: round(value, 1) for name, value in run.items()} for run in runs]
    met = {
        "engine_step_us": report["engine_step_us"]["median"] <= BARS["engine_step_us"],
        "first_byte_ms": statistics.median(report["first_byte_ms"]) <= BARS["first_byte_ms"],
        **{
            f"front_tokens_per_s_{i}": max(run["delivered"] for run in report[f"front_interval_{i}"]) >= BARS[f"front_tokens_per_s_{i}"]
            for i in (1, 4)
        },
    }
    return {**report, "met": met}


def table(report: dict[str, Any]) -> str:
    """What `measure` found, for a terminal."""
    step, limit = report["engine_step_us"], BARS["engine_step_us"]
    wall, cpu = (statistics.median(report[name]) for name in ("first_byte_ms", "first_byte_front_cpu_ms"))
    lines = [
        f"engine step at {NUM_SEQS} sequences: median {step['median']:.0f} us, p99 {step['p99']:.0f} (bar {limit:.0f})",
        f"GET /v1/models, first byte after start: median {wall:.0f} ms, the front's processor time {cpu:.0f} ms (bar 600)",
    ]
    for interval in (1, 4):
        limit = BARS[f"front_tokens_per_s_{interval}"]
        for run in report[f"front_interval_{interval}"]:
            told = f"offered {run['offered']:,.0f} tokens/s, delivered {run['delivered']:,.0f}"
            lines.append(
                f"front, interval {interval}: {told}; its processor time allows {run['tokens_per_front_cpu_s']:,.0f} (bar {limit:,.0f})"
            )
    return "\n".join([*lines, met_line(report)])


def met_line(report: dict[str, Any]) -> str:
    """Which bars were met."""
    return "met: " + ", ".join(f"{name} {'yes' if good else 'NO'}" for name, good in report["met"].items())


def main() -> int:
    if sys.argv[1:2] == ["--engine"]:
        from llmc.runtime.engine_process import main as engine_main

        return engine_main(CannedEngine)
    if sys.argv[1:2] == ["--serve"]:
        return serve_canned(sys.argv[2])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--quick", action="store_true", help="few steps: does it work, not how fast")
    arguments = parser.parse_args()
    report = measure(quick=arguments.quick)
    finish("host", report, as_json=arguments.json, table=table(report), keep=not arguments.quick)
    return 0 if all(report["met"].values()) or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
