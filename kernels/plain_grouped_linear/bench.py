"""plain_grouped_linear on a GPU: GB/s of the experts read, TFLOP/s: python -m llmc.kernels.plain_grouped_linear.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..gpu_bench import DEVICE, Case, main, random


def arguments(rows: int, experts: int, n: int, k: int) -> tuple[Tensor | None, ...]:
    return random(rows, k), random(experts, n, k), torch.arange(rows, device=DEVICE) % experts, None


def cases() -> Iterator[Case]:
    from .triton_impl import plain_grouped_linear

    for experts, n, k, top in ((128, 1536, 2048, 8), (32, 5760, 2880, 4)):
        for tokens in (1, 16, 64, 256, 2048):
            rows = tokens * top
            used = min(experts, rows)  # rows are dealt out evenly
            yield Case(
                name=f"plain_grouped_linear {tokens} tokens, {top} of {experts} experts, {n}x{k}",
                make=partial(arguments, rows, experts, n, k),
                ours=plain_grouped_linear,
                moved_bytes=(rows * k + used * n * k + rows * n) * 2,
                flop=2 * rows * n * k,
            )


if __name__ == "__main__":
    main(cases)
