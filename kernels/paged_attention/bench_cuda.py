"""paged_attention on a GPU: GB/s of K and V in decode, TFLOP/s in prefill, against torch's SDPA on contiguous K and V (no paging).

python -m llmc.kernels.paged_attention.bench_cuda
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gpu_bench import DEVICE, Case, main, random

if TYPE_CHECKING:  # triton stands behind it
    from .triton_impl import Work

BLOCK = 16


def arguments(batch: int, context: int, queries: int, heads: int, kv_heads: int, dim: int, fp8: bool = False) -> tuple[Any, ...]:
    """The op's arguments; every sequence has `context` keys, the last `queries` of them new. fp8: so the cache holds them."""
    blocks = -(-context // BLOCK)
    q, k, v = random(batch * queries, heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], dim=1)
    k_cache, v_cache = (random(batch * blocks, kv_heads, BLOCK, dim) for _ in range(2))
    if fp8:
        k_cache, v_cache = (torch.randint(0, 120, c.shape, dtype=torch.uint8, device=DEVICE) for c in (k_cache, v_cache))
    tables = torch.randperm(batch * blocks, device=DEVICE, dtype=torch.int32).view(1, batch, blocks)
    positions = torch.arange(context - queries, context, device=DEVICE)
    slots = (tables[0].long()[:, positions // BLOCK] * BLOCK + positions % BLOCK).view(1, -1)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * queries
    return (q, k, v, k_cache, v_cache, slots, tables, lengths, starts, 0, 0, dim**-0.5, 0, 0.0, None)


def sdpa(batch: int, queries: int, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> Tensor:
    """SDPA with the cache's memory read as if it were contiguous: the same bytes, other numbers."""
    kv_heads, dim = k_cache.shape[1], k_cache.shape[3]
    keys, values = (cache.view(batch, kv_heads, -1, dim) for cache in (k_cache, v_cache))
    return F.scaled_dot_product_attention(
        q.unflatten(0, (batch, queries)).transpose(1, 2), keys, values, is_causal=queries > 1, enable_gqa=True
    )


def measured_case(heads_per_kv: int, dim: int, fp8: bool, decode: bool) -> Case:
    """What `llmc tune` takes the time of: 64 sequences of 4096 keys that decode, or one prompt of 2048."""
    from .triton_impl import paged_attention

    kv_heads = 8
    batch, context, queries = (64, 4096, 1) if decode else (1, 2048, 2048)
    made = partial(arguments, batch, context, queries, heads_per_kv * kv_heads, kv_heads, dim, fp8)
    moved = batch * context * kv_heads * dim * 2 * (1 if fp8 else 2)
    return Case(name="tuned", make=made, ours=partial(paged_attention, decode=decode), moved_bytes=moved)


def check_bits(heads_per_kv: int, dim: int, fp8: bool, decode: bool, work: Work) -> None:
    """Compare the result with that of the way chosen by rule.

    Raises:
        RuntimeError: a bit differs.
    """
    case = measured_case(heads_per_kv, dim, fp8, decode)
    made = case.make()
    if not torch.equal(case.ours(*made, work=work), case.ours(*made)):
        raise RuntimeError(f"attention of {heads_per_kv} heads of {dim} has other bits with {work}")


def cases() -> Iterator[Case]:
    from .triton_impl import paged_attention

    for heads, kv_heads in ((16, 8), (32, 8)):
        for batch, context in ((1, 2048), (1, 16384), (8, 4096), (64, 1024), (64, 4096), (256, 1024)):
            yield Case(
                name=f"decode {batch}x{context}, {heads}/{kv_heads} heads",
                make=partial(arguments, batch, context, 1, heads, kv_heads, 128),
                ours=partial(paged_attention, decode=True),
                moved_bytes=batch * context * kv_heads * 128 * 2 * 2,
                flop=4 * batch * context * heads * 128,
                baselines={"sdpa": partial(sdpa, batch, 1)},
            )
        for batch, context in ((1, 16384), (64, 4096)):
            yield Case(
                name=f"decode fp8 {batch}x{context}, {heads}/{kv_heads} heads",
                make=partial(arguments, batch, context, 1, heads, kv_heads, 128, True),
                ours=partial(paged_attention, decode=True),
                moved_bytes=batch * context * kv_heads * 128 * 2,
                flop=4 * batch * context * heads * 128,
            )
        for batch, tokens in ((1, 512), (1, 2048), (1, 8192), (4, 2048)):
            yield Case(
                name=f"prefill {batch}x{tokens}, {heads}/{kv_heads} heads",
                make=partial(arguments, batch, tokens, tokens, heads, kv_heads, 128),
                ours=paged_attention,
                moved_bytes=2 * batch * tokens * (heads + kv_heads) * 128 * 2,
                flop=2 * batch * tokens * (tokens + 1) * heads * 128,
                baselines={"sdpa": partial(sdpa, batch, tokens)},
            )


if __name__ == "__main__":
    main(cases)
