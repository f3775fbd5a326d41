"""Time llmc.linear, and llmc.quantized_linear with weights of 8 and 4 bits, against torch's F.linear. Prints one JSON object:
GB/s of weights as they are stored, for few rows; GFLOP/s for many; each contender's median time as a share of llmc.linear's.

    python -m llmc.kernels.linear.bench --threads 2 --rows 1 8 512

Every call gets another copy of the weights, so that none comes from a cache; all copies lie in huge pages, as the runtime keeps
them. Both contenders run in turns, so that noise of the machine hits both.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..build import build_kernels
from ..isa import LEVELS, resolve_target
from ..native import NativeKernels
from ..packing import packed_shape

# (N, K) of Qwen3-0.6B: qkv, o, gate and up, down, lm_head
SHAPES = ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024))
MATMUL_OPS = ("linear", "embedding", "grouped_linear", "quantized_linear")
GROUP = 32  # inputs that share a scale, as the compiler quantises
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_HUGE_PAGE_BYTES = 2 << 20


def huge_page_tensor(num_bytes: int) -> Tensor:
    """uint8 [num_bytes] on anonymous memory that asked for huge pages, aligned to one; never unmapped before the process ends."""
    region = mmap.mmap(-1, num_bytes + _HUGE_PAGE_BYTES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    offset = -address % _HUGE_PAGE_BYTES
    region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=torch.uint8, count=num_bytes, offset=offset)


def weight_copies(shape: tuple[int, ...], dtype: torch.dtype, total_bytes: int) -> list[Tensor]:
    """As many random tensors as fill `total_bytes`, at least two, in huge pages."""
    one = torch.Size(shape).numel() * dtype.itemsize
    count = max(2, total_bytes // one)
    flat = huge_page_tensor(one * count)
    values = torch.randn(1 << 20) * 0.02 if dtype.is_floating_point else torch.randint(0, 128, (1 << 20,))
    values = values.to(dtype).view(torch.uint8)
    for begin in range(0, flat.numel(), values.numel()):
        piece = flat[begin : begin + values.numel()]
        piece.copy_(values[: piece.numel()])
    return [flat[i * one : (i + 1) * one].view(dtype).view(shape) for i in range(count)]


def in_turns(contenders: dict[str, Callable[[int], Tensor]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call; every contender runs bursts of about 50 ms in turn."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    burst: dict[str, int] = {}
    for name, call in contenders.items():
        call(0)
        begin = time.perf_counter()
        call(1)
        burst[name] = max(1, int(0.05 / (time.perf_counter() - begin)))
    turn, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in contenders.items():
            for _ in range(burst[name]):
                turn += 1
                begin = time.perf_counter()
                call(turn)
                taken[name].append(time.perf_counter() - begin)
    return taken


def measure(native: NativeKernels, m: int, n: int, k: int, dtype: torch.dtype, total_bytes: int, seconds: float) -> dict[str, object]:
    """One shape: both contenders, times in microseconds, GB/s of weights and GFLOP/s at the median."""
    numpy_dtype = "float32" if dtype == torch.float32 else "float16"
    x = torch.randn(m, k).to(dtype)
    packed = weight_copies(packed_shape(n, k, numpy_dtype), dtype, total_bytes)
    plain = weight_copies((n, k), dtype, total_bytes)
    panels, pairs, groups = -(-n // 16), -(-k // 32) * 16, -(-k // GROUP)
    scales = weight_copies((panels, groups, 16), dtype, total_bytes // 16)
    int8 = weight_copies((panels, pairs, 16, 2), torch.int8, total_bytes // 2)
    int4 = weight_copies((panels, pairs, 16), torch.uint8, total_bytes // 4)

    def quantized(weights: list[Tensor]) -> Callable[[int], Tensor]:
        return lambda turn: native.quantized_linear(x, weights[turn % len(weights)], scales[turn % len(scales)], None, n, GROUP)

    taken = in_turns(
        {
            "llmc": lambda turn: native.linear(x, packed[turn % len(packed)], None, n),
            "llmc int8": quantized(int8),
            "llmc int4": quantized(int4),
            "torch": lambda turn: F.linear(x, plain[turn % len(plain)]),
        },
        seconds,
    )
    scale_bytes = panels * groups * 16 * dtype.itemsize
    stored = {"llmc int8": int8[0].nbytes + scale_bytes, "llmc int4": int4[0].nbytes + scale_bytes}
    base = sorted(taken["llmc"])[len(taken["llmc"]) // 2]
    result: dict[str, object] = {"m": m, "n": n, "k": k}
    for name, times in taken.items():
        times.sort()
        low, median, high = times[0], times[len(times) // 2], times[-1]
        weight_bytes = stored.get(name, n * k * dtype.itemsize)
        result[name] = {
            "calls": len(times),
            "us": {"min": round(low * 1e6, 1), "median": round(median * 1e6, 1), "max": round(high * 1e6, 1)},
            "of_llmc_time": round(median / base, 3),
            "gb_per_s": {"median": round(weight_bytes / median / 1e9, 1), "best": round(weight_bytes / low / 1e9, 1)},
            "gflop_per_s": {"median": round(2 * m * n * k / median / 1e9, 1), "best": round(2 * m * n * k / low / 1e9, 1)},
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", choices=list(LEVELS), default=None, help="instruction-set level; default: this machine's best")
    parser.add_argument("--dtype", choices=list(_DTYPES), default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 512])
    parser.add_argument("--shapes", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES], help="NxK ...")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=3.0, help="per shape and row count")
    parser.add_argument("--megabytes", type=int, default=1024, help="of distinct weights per contender")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "llmc" / "kernels")
    chosen = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(chosen.threads)
    isa = chosen.isa or resolve_target("cpu").isa
    built = build_kernels(isa, chosen.cache_dir, ops=MATMUL_OPS)
    native = NativeKernels(built.kernels_so, chosen.threads)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    results = []
    for shape in chosen.shapes:
        n, k = (int(part) for part in shape.split("x"))
        for m in chosen.rows:
            results.append(measure(native, m, n, k, _DTYPES[chosen.dtype], chosen.megabytes << 20, chosen.seconds))
    report = {
        "benchmark": "linear", "commit": commit.stdout.strip() or None, "seed": 0, "machine": platform.machine(), "cpus": os.cpu_count(),
        "isa": isa, "dtype": chosen.dtype, "threads": chosen.threads, "weights_mb": chosen.megabytes, "huge_pages": True,
        "torch": torch.__version__, "compiler": built.compiler, "kernels": built.source_digest, "results": results,
    }  # fmt: skip
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
