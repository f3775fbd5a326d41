"""Decode at batch 1, prefill of 512 tokens and 8 concurrent sequences, against Hugging Face in the same run.

    python benchmarks/decode.py [--models S M] [--rounds 3] [--json] [--quantization int8] [--peers [DIR]]

llmc and the baseline alternate in fresh processes, the workers of `llmc bench`; ratios are of medians. --quantization adds rows of a
quantised artifact beside the plain one. --peers adds, at one and two threads, llama.cpp, vLLM and OpenVINO beside llmc in bf16 and int8,
their start and their memory (decode_peers.py says what DIR holds; LLMC_PEERS_DIR is its default).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.decode_peers import lines as peer_lines
from benchmarks.decode_peers import llmc_tok_s, measure_peers, peer_tok_s, peers, tok_s, turns
from benchmarks.models import make_model
from llmc.bench.contenders import hf_rows
from llmc.bench.workload import Mode

MODES = (
    Mode(name="decode", batch=1, prompt_tokens=128, new_tokens=64),
    Mode(name="prefill", batch=1, prompt_tokens=512, new_tokens=2),
    Mode(name="concurrent", batch=8, prompt_tokens=128, new_tokens=64),
)
BARS = {"S": {"decode": 3.0, "prefill": 1.5, "concurrent": 4.0}, "M": {"decode": 1.5, "prefill": 1.0, "concurrent": 1.5}}
PEERS = Path(os.environ.get("LLMC_PEERS_DIR", Path.home() / ".cache" / "llmc-peers"))


def hf_tok_s(model: Path, modes: Sequence[Mode], threads: int) -> dict[str, list[float]]:
    """As llmc_tok_s."""
    found = hf_rows(model, "bfloat16", modes, threads=threads, warmup=1, repeats=3, seed=0)
    return {mode.name: [tok_s(row, mode) for row in found["modes"][mode.name]] for mode in modes}


def measure(name: str, rounds: int, threads: int, folder: Path | None, quantization: str | None, *, plain_llama: bool) -> dict[str, object]:
    model = make_model(name, harness.WORK)
    artifact = harness.WORK / f"{name}-O2"
    compile_s = harness.compiled(model, artifact, "-O2")
    harness.warm(artifact)
    result: dict[str, object] = {"compile_s": compile_s}
    bf16 = peers(folder, name, model, plain_llama=plain_llama)[0] if folder is not None else None
    llama = bf16 if bf16 is not None and bf16.missing is None else None
    smaller = artifact.with_name(f"{artifact.name}-{quantization}")
    if quantization is not None:
        result["quantized_compile_s"] = harness.compiled(model, smaller, "-O2", "--quantization", quantization)
        harness.warm(smaller)
    contenders = {"llmc": partial(llmc_tok_s, artifact, MODES), "hf": partial(hf_tok_s, model, MODES)}
    if quantization is not None:
        contenders["quantized"] = partial(llmc_tok_s, smaller, MODES)
    if llama is not None:
        contenders["llama"] = partial(peer_tok_s, llama, MODES[:1])
    rows, failed = turns(contenders, threads, rounds)
    if failed:
        result["not_measured"] = failed
    for mode in MODES:
        ours, theirs = rows["llmc"][mode.name], rows["hf"][mode.name]
        quantized, other = (rows.get(who, {}).get(mode.name) for who in ("quantized", "llama"))
        row: dict[str, object] = {
            "llmc_tok_s": harness.summary(ours),
            "hf_tok_s": harness.summary(theirs),
            "ratio_to_hf": statistics.median(ours) / statistics.median(theirs),
            "bar": BARS[name][mode.name],
        }
        if quantized:
            row["quantized_tok_s"] = harness.summary(quantized)
            row["ratio_of_quantized_to_plain"] = statistics.median(quantized) / statistics.median(ours)
        if other:
            row["llama_cpp_tok_s"] = harness.summary(other)
            row["ratio_to_llama_cpp"] = statistics.median(ours) / statistics.median(other)
        result[mode.name] = row
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["S", "M"], choices=["S", "M"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quantization", choices=["int8", "int4"], default=None, help="rows of an artifact with quantised weights too")
    parser.add_argument("--peers", nargs="?", type=Path, const=PEERS, metavar="DIR", help="other engines too, at one and two threads")
    parser.add_argument("--llama-plain", action="store_true", help="llama.cpp without repacked buffers, where its AMX code crashes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = {
        name: measure(name, args.rounds, args.threads, args.peers, args.quantization, plain_llama=args.llama_plain) for name in args.models
    }
    if args.peers is not None:
        for name, result in results.items():
            model, int8 = make_model(name, harness.WORK), harness.WORK / f"{name}-O2-int8"
            harness.compiled(model, int8, "-O2", "--quantization", "int8")
            harness.warm(int8)
            plain = harness.WORK / f"{name}-O2"
            result["peers"] = measure_peers(name, model, plain, int8, args.peers, list(MODES), args.rounds, plain_llama=args.llama_plain)
    lines = [f"{'model':<6}{'what':<12}{'llmc tok/s':>12}{'HF tok/s':>12}{'ratio':>8}{'bar':>6}"]
    for name, result in results.items():
        for mode in MODES:
            row = result[mode.name]
            ours, theirs = row["llmc_tok_s"]["median"], row["hf_tok_s"]["median"]  # type: ignore[index]
            lines.append(f"{name:<6}{mode.name:<12}{ours:>12.1f}{theirs:>12.1f}{row['ratio_to_hf']:>8.2f}{row['bar']:>6}")  # type: ignore[index]
            if args.quantization is not None:
                smaller, ratio = row["quantized_tok_s"]["median"], row["ratio_of_quantized_to_plain"]  # type: ignore[index]
                lines.append(f"{name:<6}{mode.name + ' ' + args.quantization:<18}{smaller:>6.1f} tok/s, {ratio:.2f} of llmc's plain")
        if args.peers is not None:
            lines += peer_lines(name, result["peers"])  # type: ignore[arg-type]
    harness.finish(
        "decode", {"models": results, "threads": args.threads, "quantization": args.quantization}, as_json=args.json, table="\n".join(lines)
    )


if __name__ == "__main__":
    main()
