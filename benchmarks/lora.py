"""What LoRA adapters cost a decode step: without room for them, with room and none, one adapter, two adapters in one batch.

    python benchmarks/lora.py [--models S] [--batch 4] [--rank 16] [--threads 2] [--json]

Rows are measured in turns in one process each, so that a machine that slows down slows all of them. `ratio` is to the artifact
without `--enable-lora`, of wall-clock time; `cpu_ratio` of processor time a token, which other work on the machine disturbs less (with
`--threads 1`: waiting threads count too). Adapters are random and change every linear of the layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import harness
from benchmarks.models import SHAPES, make_model
from llmc.artifacts.verify import open_artifact

PROMPT, NEW, REPEATS = 32, 64, 5
ROWS = ("without", "unused", "one adapter", "two adapters")


def write_adapter(folder: Path, artifact: Path, rank: int, seed: int) -> Path:
    """A random PEFT adapter over everything that the artifact has room for."""
    from safetensors.numpy import save_file

    with open_artifact(artifact) as opened:
        facts = opened.manifest.lora
    assert facts is not None
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for module in facts.modules:
        name = f"base_model.model.{module.name}"
        tensors[f"{name}.lora_A.weight"] = (rng.standard_normal((rank, module.in_features)) * 0.02).astype(np.float16)
        tensors[f"{name}.lora_B.weight"] = (rng.standard_normal((module.out_features, rank)) * 0.02).astype(np.float16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}))
    return folder


def worker(artifact: str, adapters: list[str], batch: int, threads: int, vocab_size: int) -> None:
    """Tokens per second of decoding a batch, and milliseconds of processor time a token; one line of JSON for each line on stdin."""
    from llmc import LLM, LoRARequest, SamplingParams

    requests = [LoRARequest(f"a{i}", i + 1, folder) for i, folder in enumerate(adapters)]
    chosen = [requests[i % len(requests)] if requests else None for i in range(batch)]
    prompts = np.random.default_rng(0).integers(300, vocab_size, size=(batch, PROMPT)).tolist()
    options: dict[str, Any] = {"enable_lora": True} if adapters else {}
    with LLM(
        artifact,
        threads=threads,
        verify_weights="never",
        generation_config="llmc",
        enable_prefix_caching=False,
        num_blocks=64 * batch,
        **options,
    ) as llm:

        def seconds(new_tokens: int) -> np.ndarray:
            params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
            started = np.array([time.perf_counter(), time.process_time()])
            llm.generate(prompts, params, lora_request=chosen)
            return np.array([time.perf_counter(), time.process_time()]) - started

        seconds(2)
        for _line in sys.stdin:
            wall, cpu = seconds(1 + NEW) - seconds(1)
            print(json.dumps([batch * NEW / wall, cpu * 1000 / (batch * NEW)]), flush=True)


def measure(name: str, batch: int, rank: int, threads: int) -> dict[str, Any]:
    model = make_model(name, harness.WORK)
    plain, roomy = harness.WORK / f"{name}-O2", harness.WORK / f"{name}-O2-lora{rank}"
    for artifact, flags in ((plain, ["-O2"]), (roomy, ["-O2", "--enable-lora", "--max-loras", "2", "--max-lora-rank", str(rank)])):
        harness.compiled(model, artifact, *flags)
    adapters = [str(write_adapter(harness.WORK / f"{name}-adapter{seed}-r{rank}", roomy, rank, seed)) for seed in range(2)]
    cases = {"without": (plain, []), "unused": (roomy, []), "one adapter": (roomy, adapters[:1]), "two adapters": (roomy, adapters)}
    found: dict[str, list[list[float]]] = {row: [] for row in ROWS}
    vocab_size = SHAPES[name].vocab_size
    processes = {
        row: subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps([str(artifact), given, batch, threads, vocab_size])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for row, (artifact, given) in cases.items()
    }
    try:
        for _ in range(REPEATS):
            for row, process in processes.items():
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write("\n")
                process.stdin.flush()
                found[row].append(json.loads(process.stdout.readline()))
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    medians = {row: [statistics.median(column) for column in zip(*values, strict=True)] for row, values in found.items()}
    return {
        row: {
            "tok_s": harness.summary([speed for speed, _ in values]),
            "cpu_ms_token": harness.summary([cpu for _, cpu in values]),
            "ratio": round(medians[row][0] / medians["without"][0], 3),
            "cpu_ratio": round(medians["without"][1] / medians[row][1], 3),
        }
        for row, values in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["S"], choices=["S", "M"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*json.loads(args.worker))
        return
    results = {name: measure(name, args.batch, args.rank, args.threads) for name in args.models}
    lines = [f"{'model':<6}{'':<14}{'tok/s':>10}{'ratio':>8}{'CPU ms':>9}{'ratio':>8}"]
    for name, rows in results.items():
        for row, facts in rows.items():
            lines.append(
                f"{name:<6}{row:<14}{facts['tok_s']['median']:>10.1f}{facts['ratio']:>8.3f}"
                f"{facts['cpu_ms_token']['median']:>9.3f}{facts['cpu_ratio']:>8.3f}"
            )
    settings = {"batch": args.batch, "rank": args.rank, "threads": args.threads, "prompt_tokens": PROMPT, "new_tokens": NEW}
    harness.finish("lora", {"models": results, **settings}, as_json=args.json, table="\n".join(lines))


if __name__ == "__main__":
    main()
