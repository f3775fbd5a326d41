"""Requests from several clients at once against a running `llmc serve`, and the same work as one batch in transformers.

    python benchmarks/throughput.py [--models S] [--clients 8] [--json]

Each client streams one completion after another. transformers gets all prompts of a wave as one batch, which is the best it can
do and better than its users see, since nobody's requests arrive together.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.models import SHAPES, make_model
from llmc.bench.contenders import hf_rows
from llmc.bench.workload import Mode

PROMPT, NEW, WAVES = 128, 64, 3


def client(port: int, model: str, prompts: list[list[int]], out: list[dict[str, float]]) -> None:
    for prompt in prompts:
        started = time.perf_counter()
        body = {"model": model, "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        arrivals = [arrival for arrival, event in harness.stream_completion(port, body) if event.get("choices")]
        gaps = [b - a for a, b in itertools.pairwise(arrivals)]
        out.append({"ttft": arrivals[0] - started, "itl": statistics.median(gaps) if gaps else 0.0, "end": arrivals[-1]})


def measure(name: str, clients: int, threads: int) -> dict[str, Any]:
    model = make_model(name, harness.WORK)
    artifact = harness.WORK / f"{name}-O2"
    harness.compiled(model, artifact, "-O2")  # the cache's, if nothing has changed since
    rng = random.Random(0)
    prompts = [[[rng.randrange(300, SHAPES[name].vocab_size) for _ in range(PROMPT)] for _ in range(WAVES)] for _ in range(clients)]
    command = [sys.executable, "-m", "llmc", "serve", str(artifact), "--port", "{port}", "--threads", str(threads), "--disable-log-stats"]
    with tempfile.TemporaryDirectory() as folder, harness.server(command, Path(folder) / "log") as running:
        harness.first_token_seconds(running, {"model": name, "prompt": [5, 6, 7], "max_tokens": 1, "ignore_eos": True})
        rows: list[dict[str, float]] = []
        workers = [threading.Thread(target=client, args=(running.port, name, mine, rows)) for mine in prompts]
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if len(rows) != clients * WAVES:
            raise RuntimeError(f"{clients * WAVES - len(rows)} requests failed:\n{running.log.read_text()[-2000:]}")
        seconds = max(row["end"] for row in rows) - started
    mode = Mode(name="batch", batch=clients, prompt_tokens=PROMPT, new_tokens=NEW)
    hf = hf_rows(model, "bfloat16", [mode], threads=threads, warmup=1, repeats=3, seed=0)["modes"][mode.name]
    ours = clients * WAVES * NEW / seconds
    theirs = statistics.median(clients * NEW / row["total_s"] for row in hf)
    return {
        "llmc_served_tok_s": ours,
        "ttft_ms": harness.summary([row["ttft"] * 1e3 for row in rows]),
        "itl_ms": harness.summary([row["itl"] * 1e3 for row in rows]),
        "hf_batch_tok_s": theirs,
        "ratio_to_hf": ours / theirs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["S", "M"], choices=["S", "M"])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = {name: measure(name, args.clients, args.threads) for name in args.models}
    lines = [f"{'model':<6}{'served tok/s':>14}{'HF batch tok/s':>16}{'ratio':>8}{'TTFT ms':>10}{'ITL ms':>9}"]
    for name, row in results.items():
        lines.append(
            f"{name:<6}{row['llmc_served_tok_s']:>14.1f}{row['hf_batch_tok_s']:>16.1f}{row['ratio_to_hf']:>8.2f}"
            f"{row['ttft_ms']['median']:>10.1f}{row['itl_ms']['median']:>9.2f}"
        )
    result = {"models": results, "clients": args.clients, "threads": args.threads, "prompt_tokens": PROMPT, "new_tokens": NEW}
    harness.finish("throughput", result, as_json=args.json, table="\n".join(lines))


if __name__ == "__main__":
    main()
