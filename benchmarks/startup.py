"""Process start to first token of `llmc serve`, page cache warm, against servers and libraries started in the same run.

    python benchmarks/startup.py [--models S M] [--rounds 5] [--json] [--vllm PYTHON]

--vllm names the Python of an environment with vLLM; its faster mode, eager, is measured. transformers (load and one token, no
server) is always measured. The attribution table is the median of llmc's own stages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.models import make_model

BARS_S = {"S": 3.0, "M": 4.0}
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]


def llmc_round(artifact: Path, log: Path, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "llmc", "serve", str(artifact), "--port", "{port}", "--threads", str(threads), "--disable-log-stats"]
    with harness.server(command, log) as running:
        body = {"model": artifact.name.split("-")[0], "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        seconds = harness.first_token_seconds(running, body)
        pss = harness.pss_bytes(running.process.pid)
    ready = next(json.loads(line) for line in log.read_text().splitlines() if '"ready"' in line and line.startswith("{"))
    stages = {key.removesuffix("_ms"): value for key, value in ready.items() if key.endswith("_ms")}
    return {"seconds": seconds, "pss_bytes": pss, "stages_ms": stages}


def vllm_round(python: str, model: Path, log: Path, threads: int) -> float:
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1", "--port", "{port}"]
    options = ["--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager"]
    environ = {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with harness.server([*command, *options], log, environ) as running:
        body = {"model": str(model), "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        return harness.first_token_seconds(running, body)


def hf_round(model: Path, threads: int) -> float:
    started = time.time()
    command = [sys.executable, "benchmarks/worker_hf.py", str(model), "--startup", "--threads", str(threads)]
    return float(harness.json_of(command, {"HF_HUB_OFFLINE": "1"})["first_token_at"]) - started


def measure(name: str, rounds: int, threads: int, vllm: str | None) -> dict[str, Any]:
    model = make_model(name, harness.WORK)
    artifact = harness.WORK / f"{name}-O2"
    if not (artifact / "manifest.json").is_file():
        harness.compiled(model, artifact, "-O2")
    harness.warm(model)
    harness.warm(artifact)
    ours: list[dict[str, Any]] = []
    hf: list[float] = []
    peer: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        llmc_round(artifact, log, threads)  # fills the page cache with code, too
        for number in range(rounds):
            ours.append(llmc_round(artifact, log, threads))
            hf.append(hf_round(model, threads))
            if vllm is not None and number < 3:
                peer.append(vllm_round(vllm, model, log, threads))
    stages = {stage: statistics.median(run["stages_ms"][stage] for run in ours) for stage in ours[0]["stages_ms"]}
    seconds = [run["seconds"] for run in ours]
    result: dict[str, Any] = {
        "llmc_s": harness.summary(seconds),
        "bar_s": BARS_S[name],
        "pss_mb": harness.summary([run["pss_bytes"] / 1e6 for run in ours]),
        "stages_ms": stages,
        "transformers_s": harness.summary(hf),
        "ratio_transformers": statistics.median(hf) / statistics.median(seconds),
    }
    if peer:
        result["vllm_eager_s"] = harness.summary(peer)
        result["ratio_vllm_eager"] = statistics.median(peer) / statistics.median(seconds)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["S", "M"], choices=["S", "M"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vllm", default=None, metavar="PYTHON")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = {name: measure(name, args.rounds, args.threads, args.vllm) for name in args.models}
    lines = []
    for name, row in results.items():
        lines.append(f"{name}: first token after {row['llmc_s']['median']:.2f} s (bar {row['bar_s']} s), {row['pss_mb']['median']:.0f} MB")
        lines.append(f"   transformers {row['transformers_s']['median']:.2f} s, {row['ratio_transformers']:.1f} times as long")
        if "vllm_eager_s" in row:
            lines.append(f"   vLLM eager {row['vllm_eager_s']['median']:.2f} s, {row['ratio_vllm_eager']:.1f} times as long")
        lines += [f"   {stage:<28}{milliseconds:>8.0f} ms" for stage, milliseconds in row["stages_ms"].items()]
    harness.finish("startup", {"models": results, "threads": args.threads}, as_json=args.json, table="\n".join(lines))


if __name__ == "__main__":
    main()
