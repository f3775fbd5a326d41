"""plain_grouped_linear on a GPU: GB/s of the experts read, TFLOP/s: python -m llmc.kernels.plain_grouped_linear.bench"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..gpu_bench import DEVICE, Case, main, random


def cases() -> Iterator[Case]:
    from .triton_impl import plain_grouped_linear

    for experts, n, k, top in ((128, 1536, 2048, 8), (32, 5760, 2880, 4)):
        for tokens in (1, 16, 64, 256, 2048):
            rows = tokens * top
            used = min(experts, rows)  # rows are dealt out evenly
            yield Case(
                name=f"plain_grouped_linear {tokens} tokens, {top} of {experts} experts, {n}x{k}",
                make=lambda r=rows, e=experts, n=n, k=k: (random(r, k), random(e, n, k), torch.arange(r, device=DEVICE) % e, None),
                ours=plain_grouped_linear,
                moved_bytes=(rows * k + used * n * k + rows * n) * 2,
                flop=2 * rows * n * k,
            )


if __name__ == "__main__":
    main(cases)
