"""Worker: the CPU kernels of one artifact, timed on its own shapes, and what the machine can do at most.

    {"artifact": DIR, "threads": 2, "rows": [1, 8, 512], "context": 512, "seconds": 1.0, "megabytes": 256, "seed": 0}
    -> {"bandwidth_gb_s", "peak_gflop_s", "rows": [{"name", "rows", "count", "us", "us_samples", "timed_calls", "bytes", "flop"}],
        "left_out": [names]}

`us_samples`: the calls of a kernel in their order, in nine runs of as many, and each run's median: calls that follow each other share
what the machine does beside them, so they are no independent samples. `us`: the median of these.

Rows up to 64 are sequences that decode, more are one prompt, of which the last row alone wants logits.
Every call reads another copy of the weights, so that none comes from a cache; the limits are the best of several runs, in the same
process: reading (a sum and a matrix-vector product over huge pages) and computing (a square product in torch), or what a kernel reached
where that is more. Attention's caches are small, so what it reads per second is no measure of the memory.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmc.artifacts.verify import open_artifact
from llmc.bench.kernels import MOST_DECODING
from llmc.compiler.report_page import kernel_name
from llmc.errors import InternalError, LlmcError
from llmc.kernels.linear.bench import huge_page_tensor, in_turns, weight_copies
from llmc.kernels.native import NativeKernels
from llmc.kernels.packing import packed_shape
from llmc.kernels.paged_attention.bench import Case, contenders
from llmc.kernels.paged_attention.compiled import CompiledPagedAttention, PagedAttentionArgs

_READ_BYTES = 512 << 20
_SQUARE = 2048
_ATTENTION = ("paged_attention", "paged_attend")
_RUNS = 9  # of a kernel's calls


def read_gb_s() -> float:
    """The best of ten sums and ten matrix-vector products over half a gigabyte."""
    data = huge_page_tensor(_READ_BYTES).view(torch.float32)
    data.fill_(1.0)
    matrix = data.view(8192, -1)
    vector, out = torch.ones(matrix.shape[1]), torch.empty(8192)
    return max(_READ_BYTES / _seconds(call) / 1e9 for call in (data.sum, lambda: torch.mv(matrix, vector, out=out)) for _ in range(10))


def product_gflop_s(dtype: torch.dtype) -> float:
    """The best of ten square products by torch's library."""
    a, b = torch.randn(_SQUARE, _SQUARE).to(dtype), torch.randn(_SQUARE, _SQUARE).to(dtype)
    return max(2 * _SQUARE**3 / _seconds(lambda: a @ b) / 1e9 for _ in range(10))


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class Taken:
    """How long calls took: the medians of runs of them, microseconds, and how many they were."""

    us_samples: list[float]
    timed_calls: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Taken:
        """Of the calls' times in their order, at least one."""
        count = min(_RUNS, len(seconds))
        edges = [len(seconds) * i // count for i in range(count + 1)]
        return cls([1e6 * statistics.median(seconds[a:b]) for a, b in itertools.pairwise(edges)], len(seconds))

    def as_row(self) -> dict[str, Any]:
        return {"us": statistics.median(self.us_samples), "us_samples": self.us_samples, "timed_calls": self.timed_calls}


def time_linear(native: NativeKernels, kernel: dict[str, Any], m: int, dtype: torch.dtype, request: dict[str, Any]) -> Taken:
    """Calls with m rows."""
    n, k, budget = kernel["rows"], kernel["columns"], request["megabytes"] << 20
    x = torch.randn(m, k).to(dtype)
    if kernel["op"] == "linear":
        weights = weight_copies(packed_shape(n, k, "float32" if dtype == torch.float32 else "float16"), dtype, budget)
        call = {"it": lambda turn: native.linear(x, weights[turn % len(weights)], None, n)}
    else:
        panels, pairs = -(-n // 16), -(-k // 32) * 16
        eight = kernel["dtype"] == "int8"
        shape, held = ((panels, pairs, 16, 2), torch.int8) if eight else ((panels, pairs, 16), torch.uint8)
        weights = weight_copies(shape, held, budget)
        group = group_of(kernel, dtype)
        scales = weight_copies((panels, -(-k // group), 16), dtype, max(1, budget // 16))
        call = {"it": lambda turn: native.quantized_linear(x, weights[turn % len(weights)], scales[turn % len(scales)], None, n, group)}
    return Taken.of(in_turns(call, request["seconds"])["it"])


def time_experts(native: NativeKernels, kernel: dict[str, Any], m: int, dtype: torch.dtype, request: dict[str, Any]) -> tuple[Taken, float]:
    """Calls for m tokens, each of which chooses its experts at random, and the mean number of experts chosen."""
    n, k, experts, choices = (kernel[name] for name in ("rows", "columns", "experts", "choices"))
    shape = (experts, *packed_shape(n, k, "float32" if dtype == torch.float32 else "float16"))
    weights = weight_copies(shape, dtype, request["megabytes"] << 20)
    ids = [torch.stack([torch.randperm(experts)[:choices] for _ in range(m)]).reshape(-1) for _ in range(16)]
    x = torch.randn(m * choices, k).to(dtype)
    call = {"it": lambda turn: native.grouped_linear(x, weights[turn % len(weights)], ids[turn % len(ids)], None, n)}
    taken = Taken.of(in_turns(call, request["seconds"])["it"])
    return taken, statistics.mean(float(chosen.unique().numel()) for chosen in ids)


def group_of(kernel: dict[str, Any], dtype: torch.dtype) -> int:
    """Inputs that share a scale: what is stored beside the integers are scales, 16 for every panel and group.

    Raises:
        InternalError: no group gives so many bytes.
    """
    n, k = kernel["rows"], kernel["columns"]
    panels, padded = -(-n // 16), -(-k // 32) * 32
    integers = panels * 16 * padded // (1 if kernel["dtype"] == "int8" else 2)
    count, rest = divmod(kernel["weight_bytes"] - integers, panels * 16 * dtype.itemsize)
    for group in (*(32 << power for power in range(padded.bit_length())), *range(32, padded + 32, 32)):  # powers of two are the usual ones
        if rest == 0 and -(-k // group) == count:
            return group
    raise InternalError(f"{kernel_name(kernel)}: {kernel['weight_bytes']} bytes are no integers with scales; please report this")


class CompiledPagedAttend(CompiledPagedAttention):
    """The same kernel as `paged_attend`: what it was given to write stands in the caches already."""

    def arguments(self, *given: Any, **named: Any) -> PagedAttentionArgs:
        """As of paged_attention, nothing written."""
        args = super().arguments(*given, **named)
        args.k = args.v = args.slot_mapping = None
        return args


def time_attention(kernels_so: Path, op: str, case: Case, request: dict[str, Any]) -> Taken:
    """Calls of one layer's attention."""
    kernel = (CompiledPagedAttend if op == "paged_attend" else CompiledPagedAttention)(kernels_so, request["threads"])
    call = {"llmc": contenders(kernel, case, request["megabytes"] << 20)["llmc"]}
    return Taken.of(in_turns(call, request["seconds"])["llmc"])


def measure(request: dict[str, Any]) -> dict[str, Any]:
    with open_artifact(request["artifact"]) as artifact:
        manifest = artifact.manifest
        report = json.loads(artifact.read("report/report.json"))
    kernels_so = Path(request["artifact"]) / next(image.path for image in manifest.images if image.role == "kernels")
    dtype = getattr(torch, manifest.model.dtype)
    native = NativeKernels(kernels_so, request["threads"])
    rows, left_out = [], []
    for kernel in report.get("kernels", []):
        for m in request["rows"]:
            row = {"name": kernel_name(kernel), "rows": m, "count": kernel["count"], "streams": kernel["op"] not in _ATTENTION}
            if kernel["op"] in ("linear", "quantized_linear"):
                computed = 1 if m > MOST_DECODING and kernel.get("per") == "logits" else m
                row |= time_linear(native, kernel, computed, dtype, request).as_row()
                moved = kernel["weight_bytes"] + computed * (kernel["rows"] + kernel["columns"]) * dtype.itemsize
                row |= {"bytes": moved, "flop": computed * kernel["flop_per_token"]}
            elif kernel["op"] == "grouped_linear" and "choices" in kernel:
                taken, chosen = time_experts(native, kernel, m, dtype, request)
                vectors = m * kernel["choices"] * (kernel["rows"] + kernel["columns"]) * dtype.itemsize
                moved = round(kernel["weight_bytes"] * chosen / kernel["experts"]) + vectors
                row |= {**taken.as_row(), "bytes": moved, "flop": m * kernel["flop_per_token"]}
            elif kernel["op"] in _ATTENTION and kernel["dtype"] == manifest.model.dtype:
                case = _case(kernel, m, request["context"], manifest.kv.block_size, dtype)
                row |= time_attention(kernels_so, kernel["op"], case, request).as_row()
                row |= {"bytes": case.kv_bytes, "flop": case.flop}
            else:
                left_out.append(row["name"])
                break
            rows.append(row)
    streamed = [row for row in rows if row["streams"]]
    return {
        "bandwidth_gb_s": max([read_gb_s(), *(row["bytes"] / row["us"] / 1e3 for row in streamed)]),
        "peak_gflop_s": max([product_gflop_s(dtype), *(row["flop"] / row["us"] / 1e3 for row in rows)]),
        "rows": rows,
        "left_out": left_out,
        "dtype": manifest.model.dtype,
    }


def _case(kernel: dict[str, Any], m: int, context: int, block_size: int, dtype: torch.dtype) -> Case:
    """Up to 64 rows are that many sequences that decode; more are one prompt."""
    kv_heads = kernel["kv_bytes_per_token"] // (2 * kernel["columns"] * dtype.itemsize)
    batch, queries, keys = (m, 1, context) if m <= MOST_DECODING else (1, m, m)
    return Case(
        batch=batch,
        context=keys,
        queries=queries,
        num_heads=kernel["rows"],
        num_kv_heads=kv_heads,
        head_dim=kernel["columns"],
        block_size=block_size,
        dtype=dtype,
    )


def main(arguments: list[str]) -> int:
    request = json.loads(arguments[0])
    torch.manual_seed(request["seed"])
    torch.set_num_threads(request["threads"])
    try:
        print(json.dumps(measure(request)))
    except LlmcError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
