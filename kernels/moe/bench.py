"""The mixture-of-experts ops on a GPU: route, sort, both matmuls and the sum, at Qwen3-30B-A3B's sizes: python -m llmc.kernels.moe.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..gpu_bench import DEVICE, Case, main, random
from .reference import tile_rows

EXPERTS, TOP_K, HIDDEN, INNER = 128, 8, 2048, 768


def router(tokens: int) -> tuple[Tensor]:
    return (random(tokens, EXPERTS),)


def choices(tokens: int) -> tuple[Tensor]:
    return (torch.randint(0, EXPERTS, (tokens, TOP_K), device=DEVICE),)


def layer(tokens: int) -> tuple[Tensor, ...]:
    """x, router logits, gate_up, down."""
    return random(tokens, HIDDEN), random(tokens, EXPERTS), random(EXPERTS, 2 * INNER, HIDDEN), random(EXPERTS, HIDDEN, INNER)


def torch_route(logits: Tensor) -> Any:
    values, ids = torch.topk(logits.softmax(-1, dtype=torch.float32), TOP_K, dim=-1)
    return (values / values.sum(-1, keepdim=True)).to(logits.dtype), ids


def cases() -> Iterator[Case]:
    from ..silu_mul.triton_impl import silu_mul
    from .triton_impl import moe_combine, moe_linear, moe_route, moe_sort

    def ours(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, **options: Any) -> Tensor:
        rows = x.shape[0] * TOP_K
        weights, ids = moe_route(logits, TOP_K, True, True, False, **options)
        order = moe_sort(ids, EXPERTS, tile_rows(rows, EXPERTS), **options)
        both = moe_linear(x, gate_up, *order, None, rows, TOP_K, **options)
        inner = silu_mul(both[:, :INNER], both[:, INNER:], **options)
        return moe_combine(moe_linear(inner, down, *order, None, rows, 1, **options), weights, **options)

    def route(logits: Tensor, **options: Any) -> Any:
        return moe_route(logits, TOP_K, True, True, False, **options)

    def sort(ids: Tensor, **options: Any) -> Any:
        return moe_sort(ids, EXPERTS, tile_rows(ids.numel(), EXPERTS), **options)

    for tokens in (1, 64, 2048, 8192):
        yield Case(
            name=f"moe_route {tokens}x{EXPERTS}",
            make=partial(router, tokens),
            ours=route,
            moved_bytes=tokens * (EXPERTS * 2 + TOP_K * 10),
            baselines={"torch": torch_route},
        )
        yield Case(
            name=f"moe_sort {tokens}x{TOP_K}",
            make=partial(choices, tokens),
            ours=sort,
            moved_bytes=tokens * TOP_K * 12,
            baselines={"torch": lambda ids: ids.flatten().sort(stable=True)},
        )
        read = min(EXPERTS, tokens * TOP_K)  # experts, were the tokens spread evenly
        yield Case(
            name=f"moe layer {tokens} tokens",
            make=partial(layer, tokens),
            ours=ours,
            moved_bytes=read * 3 * INNER * HIDDEN * 2 + 2 * tokens * HIDDEN * 2,
            flop=2 * tokens * TOP_K * 3 * INNER * HIDDEN,
        )


if __name__ == "__main__":
    main(cases)
