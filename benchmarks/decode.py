"""Decode at batch 1, prefill of 512 tokens and 8 concurrent sequences, against Hugging Face in the same run.

    python benchmarks/decode.py [--models S M] [--rounds 3] [--json] [--quantization int8] [--llama PYTHON GGUF_DIR [--peers]]

llmc and the baseline alternate in fresh processes; ratios are of medians. --llama runs llama.cpp's bf16 decode through
llama-cpp-python (GGUF_DIR/S.gguf, GGUF_DIR/M.gguf). --quantization adds rows of a quantised artifact beside the plain
one. --peers adds, at one and two threads, llmc in bf16 and int8 against llama.cpp in bf16 and q8_0 (decode_peers.py).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.decode_peers import lines as peer_lines
from benchmarks.decode_peers import measure_peers
from benchmarks.models import make_model

# mode -> (batch, prompt tokens, new tokens, what is compared)
MODES = {"decode": (1, 128, 64, "decode_tok_s"), "prefill": (1, 512, 2, "prefill_s"), "concurrent": (8, 128, 64, "decode_tok_s")}
BARS = {"S": {"decode": 3.0, "prefill": 1.5, "concurrent": 4.0}, "M": {"decode": 1.5, "prefill": 1.0, "concurrent": 1.5}}


def worker(script: str, model: Path, mode: str, threads: int, *, python: str = sys.executable, extra: tuple[str, ...] = ()) -> list[float]:
    batch, prompt, new, figure = MODES[mode]
    command = [python, f"benchmarks/{script}", str(model), "--batch", str(batch), "--prompt", str(prompt), "--new", str(new), *extra]
    result = harness.json_of([*command, "--threads", str(threads)], {"PYTHONPATH": str(harness.ROOT), "OMP_NUM_THREADS": str(threads)})
    return [row[figure] if figure != "prefill_s" else prompt / row[figure] for row in result["rows"]]


def measure(name: str, rounds: int, threads: int, llama: tuple[str, Path] | None, quantization: str | None = None) -> dict[str, object]:
    model = make_model(name, harness.WORK)
    artifact = harness.WORK / f"{name}-O2"
    compile_s = harness.compiled(model, artifact, "-O2")
    harness.warm(artifact)
    result: dict[str, object] = {"compile_s": compile_s}
    smaller = artifact.with_name(f"{artifact.name}-{quantization}")
    if quantization is not None:
        result["quantized_compile_s"] = harness.compiled(model, smaller, "-O2", "--quantization", quantization)
        harness.warm(smaller)
    for mode in MODES:
        ours: list[float] = []
        theirs: list[float] = []
        other: list[float] = []
        quantized: list[float] = []
        for _ in range(rounds):
            ours += worker("worker_llmc.py", artifact, mode, threads)
            if quantization is not None:
                quantized += worker("worker_llmc.py", smaller, mode, threads)
            theirs += worker("worker_hf.py", model, mode, threads)
            if llama is not None and mode == "decode":
                other += worker("worker_llama.py", llama[1] / f"{name}.gguf", mode, threads, python=llama[0])
        row: dict[str, object] = {
            "llmc_tok_s": harness.summary(ours),
            "hf_tok_s": harness.summary(theirs),
            "ratio_to_hf": statistics.median(ours) / statistics.median(theirs),
            "bar": BARS[name][mode],
        }
        if quantized:
            row["quantized_tok_s"] = harness.summary(quantized)
            row["ratio_of_quantized_to_plain"] = statistics.median(quantized) / statistics.median(ours)
        if other:
            row["llama_cpp_tok_s"] = harness.summary(other)
            row["ratio_to_llama_cpp"] = statistics.median(ours) / statistics.median(other)
        result[mode] = row
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["S", "M"], choices=["S", "M"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quantization", choices=["int8", "int4"], default=None, help="rows of an artifact with quantised weights too")
    parser.add_argument("--llama", nargs=2, metavar=("PYTHON", "GGUF_DIR"), default=None)
    parser.add_argument("--peers", action="store_true", help="llama.cpp in bf16 and q8_0 at one and two threads; needs --llama")
    parser.add_argument("--llama-plain", action="store_true", help="llama.cpp without repacked buffers, where its AMX code crashes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    llama = (args.llama[0], Path(args.llama[1])) if args.llama else None
    results = {name: measure(name, args.rounds, args.threads, llama, args.quantization) for name in args.models}
    if args.peers:
        if llama is None:
            parser.error("--peers needs --llama PYTHON GGUF_DIR")
        for name, result in results.items():
            model, int8 = make_model(name, harness.WORK), harness.WORK / f"{name}-O2-int8"
            harness.compiled(model, int8, "-O2", "--quantization", "int8")
            harness.warm(int8)
            plain = harness.WORK / f"{name}-O2"
            result["peers"] = measure_peers(worker, name, plain, int8, llama, args.rounds, plain_llama=args.llama_plain)
    lines = [f"{'model':<6}{'what':<12}{'llmc tok/s':>12}{'HF tok/s':>12}{'ratio':>8}{'bar':>6}"]
    for name, result in results.items():
        for mode in MODES:
            row = result[mode]
            ours, theirs = row["llmc_tok_s"]["median"], row["hf_tok_s"]["median"]  # type: ignore[index]
            lines.append(f"{name:<6}{mode:<12}{ours:>12.1f}{theirs:>12.1f}{row['ratio_to_hf']:>8.2f}{row['bar']:>6}")  # type: ignore[index]
            if args.quantization is not None:
                smaller, ratio = row["quantized_tok_s"]["median"], row["ratio_of_quantized_to_plain"]  # type: ignore[index]
                lines.append(f"{name:<6}{mode + ' ' + args.quantization:<18}{smaller:>6.1f} tok/s, {ratio:.2f} of llmc's plain")
        if args.peers:
            lines += peer_lines(name, result["peers"])  # type: ignore[arg-type]
    harness.finish(
        "decode", {"models": results, "threads": args.threads, "quantization": args.quantization}, as_json=args.json, table="\n".join(lines)
    )


if __name__ == "__main__":
    main()
