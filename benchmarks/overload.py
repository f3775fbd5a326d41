"""What a server does when more is asked of it than it can do: it refuses early, and what it accepts stays on time.

    python benchmarks/overload.py [--json] [--quick]

The real front, scheduler and sampler over an executor that takes a fixed time per step, so the sustainable rate is known: sequences at
once / (tokens x step). Requests arrive at 0.5, 1, 2 and 4 times that rate, evenly, whether or not earlier ones are answered. Goodput is
requests per second that were answered whole within the latency target. Bars: at 4 times the rate, goodput within 20 % of its peak over
the rates (medians of 5), and every refusal a 429 with Retry-After. Afterwards no KV block is in use. The figures go to
benchmarks/results/overload.json. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import finish
from benchmarks.host import VOCAB, Served, met_line, serve_canned, tokenizer_json

NUM_SEQS = 16  # at once
NUM_TOKENS = 20  # of each answer
STEP_S = 0.01
MAX_QUEUE = 32  # sequences that may wait: two rounds
TARGET_S = 4 * NUM_TOKENS * STEP_S  # three rounds of work, and a quarter for all else
SUSTAINABLE = NUM_SEQS / (NUM_TOKENS * STEP_S)  # requests per second
RATES = (0.5, 1.0, 2.0, 4.0)


def paced_engine(options: dict[str, Any]) -> Any:
    """A real scheduler, runner and sampler; a step takes `step_s`."""
    import numpy as np

    from llmc.artifacts.manifest import KVFacts, KVGroup
    from llmc.runtime.batch import BatchBuilder
    from llmc.runtime.executors.logits import Logits
    from llmc.runtime.messages import EngineReady
    from llmc.runtime.runner import ModelRunner
    from llmc.runtime.sampler import Sampler
    from llmc.runtime.scheduler import Scheduler, SchedulerConfig

    step_s: float = options["step_s"]
    vocab: int = options.get("vocab", VOCAB)

    class PacedExecutor:
        def allocate_kv(self, num_blocks: int) -> None:
            """There is none."""

        def run(self, batch: Any) -> Logits:
            time.sleep(step_s)
            logits = np.zeros((len(batch.logits_indices), vocab), dtype=np.float32)
            logits[:, 7] = 1.0
            return Logits(logits)

        def close(self) -> None:
            """It holds nothing."""

    limits = SchedulerConfig(
        max_model_len=256, max_num_seqs=NUM_SEQS, max_num_batched_tokens=2048, block_size=16, num_blocks=512, eos_token_ids=frozenset({0})
    )
    facts = KVFacts(block_size=16, dtype="bfloat16", num_kv_heads=[8], head_dim=[128], groups=[KVGroup(layers=[0], window=0)])
    builder = BatchBuilder(
        block_size=16, num_groups=1, vocab_size=vocab, max_num_batched_tokens=2048, max_num_seqs=NUM_SEQS, max_model_len=256
    )

    class Engine:
        ready = EngineReady(
            num_blocks=512, block_size=16, max_model_len=256, max_num_seqs=NUM_SEQS, max_num_batched_tokens=2048, startup_ms={}
        )

        def __init__(self) -> None:
            self._scheduler = Scheduler(limits, facts)
            self._sampler = Sampler(eos_token_ids=[0], seed=0)
            self._runner = ModelRunner(PacedExecutor(), self._sampler, builder)
            self.add, self.abort = self._scheduler.add, self._scheduler.abort
            self.has_work, self.stats = self._scheduler.has_work, self._scheduler.stats

        def step(self) -> list[Any]:
            self._runner.submit(self._scheduler.plan())
            events = self._scheduler.commit(self._runner.collect())
            for event in events:
                if event.finish_reason is not None:
                    self._sampler.forget(event.request_id)
            return events

        def close(self) -> None:
            """It holds nothing."""

    return Engine()


async def _load(port: int, rate: float, seconds: float) -> dict[str, float]:
    """Requests at `rate` for `seconds`; what became of them."""
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    counts = {"good": 0, "late": 0, "refused": 0, "refused_without_retry_after": 0, "other": 0}

    async def one() -> None:
        started = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head % len(body) + body)
        answer = await reader.read(-1)
        writer.close()
        status = answer[9:12]
        if status == b"200" and answer.endswith(b"}"):
            counts["good" if time.monotonic() - started <= TARGET_S else "late"] += 1
        elif status == b"429":
            counts["refused"] += 1
            counts["refused_without_retry_after"] += b"\r\nretry-after: " not in answer.lower()
        else:
            counts["other"] += 1

    tasks: list[asyncio.Task[None]] = []
    began = time.monotonic()
    for index in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, began + index / rate - time.monotonic()))
        tasks.append(asyncio.create_task(one()))
    await asyncio.gather(*tasks)
    return {"goodput": counts["good"] / seconds, **counts}


def measure(*, quick: bool) -> dict[str, Any]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    runs, seconds = (1, 1.0) if quick else (5, 4.0)
    report: dict[str, Any] = {
        "sustainable_per_s": SUSTAINABLE,
        "target_s": TARGET_S,
        "max_queue": MAX_QUEUE,
        "rates": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.json"
        tokenizer.write_bytes(tokenizer_json())
        program = str(Path(__file__).resolve())
        settings = {"max_queue": MAX_QUEUE, "disable_access_log": True, "disable_log_stats": True}
        served = Served(tokenizer, {"step_s": STEP_S}, settings, None, program=program)
        try:
            served.await_ready()
            asyncio.run(_load(served.port, SUSTAINABLE, 0.5))  # warm up
            found: dict[float, list[dict[str, float]]] = {rate: [] for rate in RATES}
            for _ in range(runs):
                for rate in RATES:
                    found[rate].append(asyncio.run(_load(served.port, rate * SUSTAINABLE, seconds)))
            deadline = time.monotonic() + 10
            while b'"num_requests_running":0,"num_requests_waiting":0,"kv_cache_usage":0.0' not in (load := served.get("/load")):
                if time.monotonic() > deadline:
                    raise SystemExit(f"sequences or blocks were not returned: {load.decode()}")
                time.sleep(0.05)
        finally:
            served.stop()
    for rate, results in found.items():
        report["rates"][str(rate)] = {name: statistics.median(result[name] for result in results) for name in results[0]}
    peak = max(entry["goodput"] for entry in report["rates"].values())
    if peak == 0:
        raise SystemExit(f"no request was answered in time: {report}")
    report["peak"] = peak
    report["goodput_at_4x_of_peak"] = report["rates"]["4.0"]["goodput"] / peak
    unclear = sum(result["refused_without_retry_after"] + result["other"] for results in found.values() for result in results)
    report["met"] = {
        "goodput": report["goodput_at_4x_of_peak"] >= 0.8,
        "refusals": unclear == 0 and report["rates"]["4.0"]["refused"] > 0,
    }
    return report


def table(report: dict[str, Any]) -> str:
    """What `measure` found, for a terminal."""
    lines = [f"sustainable {SUSTAINABLE:.0f} requests/s, target {TARGET_S:.1f} s, at most {MAX_QUEUE} waiting"]
    for rate, entry in report["rates"].items():
        told = f"goodput {entry['goodput']:6.1f}/s, late {entry['late']:.0f}, refused {entry['refused']:.0f}"
        lines.append(f"  {rate:>4} x: {told}, anything else {entry['other']:.0f}")
    return "\n".join([*lines, f"goodput at 4 x: {report['goodput_at_4x_of_peak']:.0%} of its peak", met_line(report)])


def main() -> int:
    if sys.argv[1:2] == ["--engine"]:
        from llmc.runtime.engine_process import main as engine_main

        return engine_main(paced_engine)
    if sys.argv[1:2] == ["--serve"]:
        return serve_canned(sys.argv[2], program=str(Path(__file__).resolve()))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--quick", action="store_true", help="one short run per rate: does it work, not how well")
    arguments = parser.parse_args()
    report = measure(quick=arguments.quick)
    finish("overload", report, as_json=arguments.json, table=table(report), keep=not arguments.quick)
    return 0 if all(report["met"].values()) or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
