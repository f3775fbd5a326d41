"""Time llmc.paged_attention against its reference and torch's SDPA. Prints one JSON object.

    python -m llmc.kernels.paged_attention.bench --threads 2 --heads 16 --kv-heads 8 --head-dim 128 --decode 600 --prefill 512

decode: every sequence has one query and `context` keys; reported as GB/s of K and V read. prefill: one sequence, all its tokens at
once; reported as GFLOP/s of the causal half. Calls rotate over copies of the caches, as a model's layers do, so that a small
context is not served from the core's own cache. SDPA is given contiguous K and V (`sdpa`: no paging, torch's best case) and, for
decode, K and V gathered from blocks first (`gather_sdpa`: what paging costs without a kernel).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..build import build_kernels
from ..isa import LEVELS, resolve_target
from ..linear.bench import in_turns
from .compiled import CompiledPagedAttention
from .reference import paged_attention_reference

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measured size: `batch` sequences of `context` keys, the last `queries` of them computed now."""

    batch: int
    context: int
    queries: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def kv_bytes(self) -> int:
        return self.batch * self.context * self.num_kv_heads * self.head_dim * 2 * self.dtype.itemsize

    @property
    def flop(self) -> int:
        """Multiplications and additions of q.k and p.v, masked keys left out."""
        visible = self.queries * (self.context - self.queries) + self.queries * (self.queries + 1) // 2
        return 4 * self.batch * visible * self.num_heads * self.head_dim


def contenders(kernel: CompiledPagedAttention, case: Case, total_bytes: int) -> dict[str, Callable[[int], Tensor]]:
    """Callables that take a turn number and compute one layer's attention with the caches of that turn."""
    heads, kv_heads, dim, size = case.num_heads, case.num_kv_heads, case.head_dim, case.block_size
    blocks = -(-case.context // size)
    copies = max(2, min(32, total_bytes // case.kv_bytes))
    caches = torch.randn(copies, 2, case.batch * blocks, kv_heads, size, dim).to(case.dtype)
    tables = torch.randperm(case.batch * blocks, dtype=torch.int32).view(1, case.batch, blocks)
    qkv = torch.randn(case.batch * case.queries, heads + 2 * kv_heads, dim).to(case.dtype)
    q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
    positions = torch.arange(case.context - case.queries, case.context)
    slots = (tables[0].long()[:, positions // size] * size + positions % size).view(1, -1)
    seq_lens = torch.full((case.batch,), case.context, dtype=torch.int32)
    starts = torch.arange(case.batch + 1, dtype=torch.int32) * case.queries
    scale, out = dim**-0.5, torch.empty(q.shape, dtype=case.dtype)
    prepared = [
        kernel.arguments(out, q, k, v, c[0], c[1], slots[0], tables[0], seq_lens, starts, scale, 0, 0.0, None) for c in caches.unbind()
    ]
    dense_q = q.reshape(case.batch, case.queries, heads, dim).transpose(1, 2).contiguous()
    dense = torch.randn(copies, 2, case.batch, kv_heads, case.context, dim).to(case.dtype)
    rows = tables[0].long().flatten()

    def ours(turn: int) -> Tensor:
        kernel.run(prepared[turn % copies])
        return out

    def plain(turn: int) -> Tensor:
        k_cache, v_cache = caches[turn % copies].unbind()
        return paged_attention_reference(q, k, v, k_cache, v_cache, slots, tables, seq_lens, starts, 0, 0, scale, 0, 0.0, None)

    def sdpa(k_dense: Tensor, v_dense: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(dense_q, k_dense, v_dense, is_causal=case.queries > 1, enable_gqa=True)

    def gathered(turn: int) -> Tensor:
        k_dense, v_dense = (
            cache[rows].view(case.batch, blocks, kv_heads, size, dim).transpose(1, 2).flatten(2, 3)[:, :, : case.context]
            for cache in caches[turn % copies]
        )
        return sdpa(k_dense, v_dense)

    found: dict[str, Callable[[int], Tensor]] = {
        "llmc": ours,
        "sdpa": lambda turn: sdpa(*dense[turn % copies]),
        "reference": plain,
    }
    if case.queries == 1:
        found["gather_sdpa"] = gathered
    return found


def measure(kernel: CompiledPagedAttention, case: Case, total_bytes: int, seconds: float) -> dict[str, object]:
    """One case: per contender the times in microseconds, GB/s of K and V and GFLOP/s at the median and at best."""
    result: dict[str, object] = {"batch": case.batch, "context": case.context, "queries": case.queries, "kv_bytes": case.kv_bytes}
    for name, times in in_turns(contenders(kernel, case, total_bytes), seconds).items():
        times.sort()
        low, median, high = times[0], times[len(times) // 2], times[-1]
        result[name] = {
            "calls": len(times),
            "us": {"min": round(low * 1e6, 1), "median": round(median * 1e6, 1), "max": round(high * 1e6, 1)},
            "gb_per_s": {"median": round(case.kv_bytes / median / 1e9, 1), "best": round(case.kv_bytes / low / 1e9, 1)},
            "gflop_per_s": {"median": round(case.flop / median / 1e9, 1), "best": round(case.flop / low / 1e9, 1)},
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=list(LEVELS), default=None, help="instruction-set level; default: this machine's best")
    parser.add_argument("--dtype", choices=list(_DTYPES), default="bfloat16")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="for decode")
    parser.add_argument("--decode", type=int, nargs="*", default=[128, 600, 4096], help="contexts")
    parser.add_argument("--prefill", type=int, nargs="*", default=[64, 512, 2048], help="prompt lengths")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=3.0, help="per case")
    parser.add_argument("--megabytes", type=int, default=256, help="of distinct caches per case")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "llmc" / "kernels")
    chosen = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(chosen.threads)
    isa = chosen.isa or resolve_target("cpu").isa
    built = build_kernels(isa, chosen.cache_dir)
    kernel = CompiledPagedAttention(built.kernels_so, chosen.threads)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    sizes = [(batch, context, 1) for context in chosen.decode for batch in chosen.batch] + [
        (1, tokens, tokens) for tokens in chosen.prefill
    ]
    results = []
    for batch, context, queries in sizes:
        case = Case(
            batch=batch, context=context, queries=queries, num_heads=chosen.heads, num_kv_heads=chosen.kv_heads, head_dim=chosen.head_dim,
            block_size=chosen.block_size, dtype=_DTYPES[chosen.dtype],
        )  # fmt: skip
        results.append(measure(kernel, case, chosen.megabytes << 20, chosen.seconds))
    report = {
        "benchmark": "paged_attention", "commit": commit.stdout.strip() or None, "seed": 0, "machine": platform.machine(),
        "cpus": os.cpu_count(), "isa": isa, "dtype": chosen.dtype, "threads": chosen.threads, "heads": chosen.heads,
        "kv_heads": chosen.kv_heads, "head_dim": chosen.head_dim, "block_size": chosen.block_size, "torch": torch.__version__,
        "compiler": built.compiler, "kernels": built.source_digest, "results": results,
    }  # fmt: skip
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
