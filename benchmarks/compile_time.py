"""Time of `llmc compile` for a described GPU, on this machine, and of a second model of the same shape.

    python benchmarks/compile_time.py [--target cuda:sm_90] [--json]

The shape of Qwen3-0.6B at -O2 with nine decode and three prefill sizes, from an empty cache; then the same shape with other weights.
The bars: 600 s for the first, 20 s for the second, on 2 cores and 4 GB. Weights stay outside, so that what is timed is the compiler;
--embed adds the canaries' reference (a run of the model on this CPU) and packing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.compile_memory import anonymous_bytes
from benchmarks.models import make_model

SIZES = ("--cudagraph-capture-sizes", "1,2,4,8,16,32,64,128,256", "--compile-sizes", "128,512,2048")
BAR_SECONDS, BAR_SECOND_MODEL_SECONDS, BAR_MB = 600, 20, 4000


def other_weights(model: Path, folder: Path) -> Path:
    """The same model with a few bytes of its weights changed: another checkpoint, one shape."""
    out = folder / "same-shape"
    out.mkdir()
    for file in model.iterdir():
        if file.name != "model.safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-64:] = bytes(64)
    (out / "model.safetensors").write_bytes(data)
    return out


def compile_once(model: Path, out: Path, cache: Path, target: str, weights: str) -> dict[str, Any]:
    """Compile and watch: wall seconds, processor seconds, peak anonymous memory over the process tree, and the stages."""
    command = [sys.executable, "-m", "llmc", "compile", str(model), "-O2", "--target", target, "-o", str(out), "--weights", weights, *SIZES]
    before, started = os.times(), time.perf_counter()
    environ = {**os.environ, "LLMC_CACHE_DIR": str(cache)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environ, cwd=harness.ROOT, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.05)
    seconds, after = time.perf_counter() - started, os.times()
    if process.returncode != 0:
        assert process.stderr is not None
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}: {process.stderr.read()[-2000:]}")
    report = json.loads((out.with_name(out.name + ".report") / "report.json").read_bytes())
    return {
        "seconds": seconds,
        "processor_seconds": after.children_user + after.children_system - before.children_user - before.children_system,
        "peak_anonymous_mb": peak / 1e6,
        "stages": {stage["name"]: stage["seconds"] for stage in report["measured"]["stages"]},
        "gpu": {key: report["gpu"][key] for key in ("layers", "distinct_layers", "inductor_layers")}
        | {"kernels": len(report["gpu"]["kernels"])},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="cuda:sm_90")
    parser.add_argument("--embed", action="store_true", help="with canaries and weights in the artifact")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = make_model("M", harness.WORK)
    weights = "embed" if args.embed else "external"
    with tempfile.TemporaryDirectory(dir=harness.WORK) as name:
        folder = Path(name)
        cache = folder / "cache"
        cache.mkdir(mode=0o700)
        first = compile_once(model, folder / "first", cache, args.target, weights)
        second = compile_once(other_weights(model, folder), folder / "second", cache, args.target, weights)
    result = {
        "target": args.target,
        "sizes": " ".join(SIZES),
        "weights": weights,
        "first": first,
        "second_of_the_shape": second,
        "bars": {"first_seconds": BAR_SECONDS, "second_seconds": BAR_SECOND_MODEL_SECONDS, "peak_mb": BAR_MB},
        "met": first["seconds"] <= BAR_SECONDS and second["seconds"] <= BAR_SECOND_MODEL_SECONDS and first["peak_anonymous_mb"] <= BAR_MB,
    }
    lines = [
        f"{label}: {run['seconds']:.1f} s ({run['processor_seconds']:.1f} s of processor), peak {run['peak_anonymous_mb']:.0f} MB"
        for label, run in (("first", first), ("second of the shape", second))
    ]
    harness.finish("compile_time", result, as_json=args.json, table="\n".join(lines))


if __name__ == "__main__":
    main()
