"""Process start to first token of `llmc serve`, page cache warm, against servers and libraries started in the same run.

    python benchmarks/startup.py [--models S M] [--rounds 5] [--json] [--vllm PYTHON]

--vllm names the Python of an environment with vLLM; its faster mode, eager, is measured. transformers (load and one token, no
server) is always measured. The attribution table is the median of llmc's own stages.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.decode_peers import vllm_start
from benchmarks.models import make_model
from llmc.bench.contenders import ColdStart, cold_start, hf_cold_start

BARS_S = {"S": 3.0, "M": 4.0}


def measure(name: str, rounds: int, threads: int, vllm: str | None) -> dict[str, Any]:
    model = make_model(name, harness.WORK)
    artifact = harness.WORK / f"{name}-O2"
    harness.compiled(model, artifact, "-O2")  # the cache's, if nothing has changed since
    harness.warm(model)
    harness.warm(artifact)
    ours: list[ColdStart] = []
    hf: list[float] = []
    peer: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        cold_start(artifact, threads=threads)  # fills the page cache with code, too
        for number in range(rounds):
            ours.append(cold_start(artifact, threads=threads))
            hf.append(hf_cold_start(model, "bfloat16", threads=threads)[0])
            if vllm is not None and number < 3:
                peer.append(vllm_start(vllm, model, log, threads, eager=True)[0])
    stages = {stage: statistics.median(run.stages_ms[stage] for run in ours) for stage in ours[0].stages_ms}
    seconds = [run.seconds for run in ours]
    result: dict[str, Any] = {
        "llmc_s": harness.summary(seconds),
        "bar_s": BARS_S[name],
        "pss_mb": harness.summary([run.pss_bytes / 1e6 for run in ours]),
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
