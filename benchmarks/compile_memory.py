"""Peak anonymous memory of a compile with weights, against the same compile without them, on a 2-GB checkpoint.

    python benchmarks/compile_memory.py [--json]

The bar: at most that of `--weights external` plus the largest tensor plus 500 MB. Mapped files (the checkpoint) are not anonymous.
Also measured: the second compile of the same input, with the artifact there and after it was deleted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.models import SHAPES, Shape, make_model

# About 1.0 G parameters in bf16; few layers, so that the time goes into weights and not into the graph.
SHAPES["2GB"] = Shape(vocab_size=131072, hidden_size=2048, intermediate_size=8192, num_hidden_layers=12, num_attention_heads=16,
                      num_key_value_heads=8, head_dim=128)  # fmt: skip
LARGEST_TENSOR_BYTES = 131072 * 2048 * 2


def anonymous_bytes(pid: int) -> int:
    """RssAnon over a process tree."""
    total = 0
    for member in harness.process_tree(pid):
        try:
            lines = Path(f"/proc/{member}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    return total


def compile_once(model: Path, out: Path, cache: Path, *options: str) -> dict[str, Any]:
    """Compile and watch; returns seconds and the peak of anonymous memory over the process tree, sampled every 20 ms."""
    command = [sys.executable, "-m", "llmc", "compile", str(model), "-O2", "-o", str(out), "--force", *options]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "LLMC_CACHE_DIR": str(cache)}, cwd=harness.ROOT
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    return {"seconds": time.perf_counter() - started, "peak_anonymous_mb": peak / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = make_model("2GB", harness.WORK)
    with tempfile.TemporaryDirectory(dir=harness.WORK) as folder:
        out = Path(folder) / "artifact"
        cache, other = Path(folder) / "cache", Path(folder) / "other"  # apart, so that both lower the graph
        cache.mkdir(mode=0o700)
        other.mkdir(mode=0o700)
        external = compile_once(model, Path(folder) / "external", other, "--weights", "external")
        embedded = compile_once(model, out, cache)
        again = compile_once(model, out, cache)
        shutil.rmtree(out)
        after_deletion = compile_once(model, out, cache)
    bar = external["peak_anonymous_mb"] + LARGEST_TENSOR_BYTES / 1e6 + 500
    result = {
        "external": external,
        "embedded": embedded,
        "bar_mb": bar,
        "met": embedded["peak_anonymous_mb"] <= bar,
        "second_compile_s": again["seconds"],
        "second_compile_after_deleting_the_artifact_s": after_deletion["seconds"],
    }
    table = "\n".join(
        [
            f"without weights  {external['peak_anonymous_mb']:.0f} MB anonymous, {external['seconds']:.0f} s",
            f"with weights     {embedded['peak_anonymous_mb']:.0f} MB anonymous, {embedded['seconds']:.0f} s (bar {bar:.0f} MB)",
            f"second compile   {again['seconds']:.2f} s; artifact deleted before: {after_deletion['seconds']:.2f} s",
        ]
    )
    harness.finish("compile_memory", result, as_json=args.json, table=table)


if __name__ == "__main__":
    main()
