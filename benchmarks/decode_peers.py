"""llama.cpp beside llmc, bf16 and 8 bits, at one and two threads: what `decode.py --peers` adds to its results.

GGUF_DIR holds NAME.gguf (bf16) and NAME-q8_0.gguf. llama.cpp's AMX code ends some virtual machines' processes with a segmentation fault;
`--llama-plain` runs it without its repacked buffers, and the result says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks import harness

THREADS = (1, 2)
# (mode, ours, theirs) -> at least; decode at batch 1 and prefill of 512 tokens
BARS = {
    ("decode", "llmc", "llama.cpp bf16"): 1.3,
    ("decode", "llmc int8", "llama.cpp q8_0"): 1.1,
    ("prefill", "llmc", "llama.cpp bf16"): 1.0,
    ("prefill", "llmc", "llama.cpp q8_0"): 1.0,
}
Worker = Callable[..., list[float]]


def measure_peers(
    worker: Worker, name: str, plain: Path, int8: Path, llama: tuple[str, Path], rounds: int, *, plain_llama: bool
) -> dict[str, object]:
    """tokens/s of each contender, in turns, and the ratios that have a bar.

    Args:
        worker: `decode.worker`.
        plain, int8: llmc's artifacts.
        llama: the Python with llama-cpp-python, and the folder of GGUF files.

    Raises:
        RuntimeError: a contender's process failed.
    """
    python, folder = llama
    extra = ("--plain",) if plain_llama else ()
    contenders: dict[str, Callable[[str, int], list[float]]] = {
        "llmc": lambda mode, threads: worker("worker_llmc.py", plain, mode, threads),
        "llmc int8": lambda mode, threads: worker("worker_llmc.py", int8, mode, threads),
        "llama.cpp bf16": lambda mode, threads: worker(
            "worker_llama.py", folder / f"{name}.gguf", mode, threads, python=python, extra=extra
        ),
        "llama.cpp q8_0": lambda mode, threads: worker(
            "worker_llama.py", folder / f"{name}-q8_0.gguf", mode, threads, python=python, extra=extra
        ),
    }
    result: dict[str, object] = {"llama_cpp_plain_buffers": plain_llama}
    for threads in THREADS:
        for mode in ("decode", "prefill"):
            seen: dict[str, list[float]] = {contender: [] for contender in contenders}
            for _ in range(rounds):
                for contender, run in contenders.items():
                    seen[contender] += run(mode, threads)
            ratios = [
                {"ours": ours, "theirs": theirs, "ratio": statistics.median(seen[ours]) / statistics.median(seen[theirs]), "bar": bar}
                for (of, ours, theirs), bar in BARS.items()
                if of == mode
            ]
            result[f"{mode}, threads {threads}"] = {"tok_s": {who: harness.summary(v) for who, v in seen.items()}, "ratios": ratios}
    return result


def lines(name: str, peers: dict[str, object]) -> list[str]:
    """For the table: one line per ratio."""
    made = []
    for what, row in peers.items():
        if isinstance(row, dict):
            made += [f"{name:<6}{what:<22}{r['ours']} / {r['theirs']}: {r['ratio']:.2f} (bar {r['bar']})" for r in row["ratios"]]
    return made
