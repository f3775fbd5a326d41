"""What the GPU benchmarks of the kernels share: cases, timing by CUDA graphs, limits of the hardware, one JSON object as the result.

A case is captured into a CUDA graph that computes it on several copies of its arguments, so that neither Python's time nor the L2
cache is measured. Its baselines run in the same process, in turns with it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmc.errors import ConfigError, InternalError

from .launch import Launch

# Vendor figures of memory bandwidth (bytes/s) and dense bf16 matrix rate (flop/s), by a part of the device's name.
LIMITS = {"H200": (4.8e12, 989e12), "H100": (3.35e12, 989e12), "A100": (2.04e12, 312e12), "L40S": (0.864e12, 362e12)}
BENCHES = (
    "rms_norm.bench", "silu_mul.bench", "gelu_mul.bench", "rope_kv_write.bench", "paged_attention.bench_cuda", "plain_linear.bench",
    "plain_quantized_linear.bench", "moe.bench", "argmax.bench", "sample.bench",
)  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU only fake tensors are made, for `compile_case`
_COLD_BYTES = 256 << 20  # of distinct arguments in one graph: several times the L2 cache
_MAX_COPIES = 32


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measured size. `make` gives a fresh copy of the arguments; `ours` and the baselines take them."""

    name: str
    make: Callable[[], tuple[Any, ...]]
    ours: Callable[..., Any]
    moved_bytes: int  # that must be read and written at least once
    flop: int = 0
    baselines: dict[str, Callable[..., Any]] = field(default_factory=dict)


def random(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal values on the GPU."""
    return torch.randn(*sizes, device=DEVICE, dtype=torch.float32).to(dtype)


def require_gpu() -> None:
    """Say what is missing.

    Raises:
        ConfigError: no GPU can be used here.
    """
    if not torch.cuda.is_available():
        raise ConfigError("this benchmark needs an NVIDIA GPU and a CUDA build of torch; torch sees no GPU on this machine")


def run_case(case: Case, repeats: int = 20) -> dict[str, Any]:
    """Times of one case and its baselines in microseconds a call, with GB/s and TFLOP/s at the median."""
    copies = max(2, min(_MAX_COPIES, -(-_COLD_BYTES // max(1, case.moved_bytes))))
    arguments = [case.make() for _ in range(copies)]
    graphs = {name: _capture(f, arguments) for name, f in {"llmc": case.ours, **case.baselines}.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repeats):
        for name, graph in graphs.items():
            times[name].append(_seconds(graph) / copies)
    memory, matrix = next((limits for part, limits in LIMITS.items() if part in torch.cuda.get_device_name()), (None, None))
    result: dict[str, Any] = {"case": case.name, "bytes": case.moved_bytes, "flop": case.flop, "copies": copies}
    for name, found in times.items():
        median = statistics.median(found)
        rates: dict[str, float] = {"gb_per_s": round(case.moved_bytes / median / 1e9, 1)}
        if memory:
            rates["of_memory_limit"] = round(case.moved_bytes / median / memory, 3)
        if case.flop:
            rates["tflop_per_s"] = round(case.flop / median / 1e12, 2)
            if matrix:
                rates["of_matrix_limit"] = round(case.flop / median / matrix, 3)
        us = {"min": min(found) * 1e6, "median": median * 1e6, "max": max(found) * 1e6}
        result[name] = {"us": {k: round(v, 2) for k, v in us.items()}, **rates}
    return result


def compile_case(case: Case, compiled: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Without a GPU: make the arguments as fake tensors, collect the launches and compile those not in `compiled`, which grows."""
    aot = importlib.import_module("llmc.kernels.aot")
    launches: list[Launch] = []
    with FakeTensorMode():
        case.ours(*case.make(), launch=launches.append)
    names = []
    for launch in launches:
        signature = aot.signature_text(launch)
        if signature not in compiled:
            made = aot.compile_launch(launch)
            if made.stack_bytes:
                raise InternalError(f"{made.entry} spills {made.stack_bytes} bytes of registers in {case.name}")
            compiled[signature] = {"registers": made.registers, "shared_bytes": made.shared_bytes, "sha256": made.sha256}
        names.append({"kernel": launch.kernel.__name__, "grid": launch.grid, **compiled[signature]})
    return {"case": case.name, "bytes": case.moved_bytes, "flop": case.flop, "launches": names}


def _capture(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles and loads the kernels, which a capture must not do
        function(*arguments[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in arguments:
            function(*one)
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _seconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def machine() -> dict[str, Any]:
    """Commit, device and versions."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {
        "commit": git.stdout.strip() or None, "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "triton": importlib.import_module("triton").__version__, "python": sys.version.split()[0],
        "cpus": os.cpu_count(), "seed": 0,
    }  # fmt: skip


def main(cases: Callable[[], Iterator[Case]]) -> None:
    """The command line of one op's benchmark."""
    parser = argparse.ArgumentParser(description=sys.modules[cases.__module__].__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    chosen = parser.parse_args()
    try:
        require_gpu()
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    torch.manual_seed(0)
    results = [run_case(case, chosen.repeats) for case in cases() if chosen.only in case.name]
    print(json.dumps({"benchmark": cases.__module__, **machine(), "results": results}, indent=1))
