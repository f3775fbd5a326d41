"""plain_linear on a GPU: GB/s for few rows, TFLOP/s for many, against torch (cuBLAS): python -m llmc.kernels.plain_linear.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from ..gpu_bench import Case, main, random

# (N, K) of Qwen3-0.6B's and Llama-8B's layers and of a vocabulary.
MATRICES = (
    (4096, 1024),
    (1024, 2048),
    (6144, 1024),
    (1024, 3072),
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (151936, 1024),
)


def arguments(tokens: int, n: int, k: int) -> tuple[Tensor | None, ...]:
    return random(tokens, k), random(n, k), None


def cases() -> Iterator[Case]:
    from .triton_impl import plain_linear

    for n, k in MATRICES:
        for tokens in (1, 16, 64, 256, 2048, 8192):
            if n > 100_000 and tokens > 256:
                continue  # nobody asks for the logits of so many rows
            yield Case(
                name=f"plain_linear {tokens}x{n}x{k}",
                make=partial(arguments, tokens, n, k),
                ours=plain_linear,
                moved_bytes=(tokens * k + n * k + tokens * n) * 2,
                flop=2 * tokens * n * k,
                baselines={"torch": F.linear},
            )


if __name__ == "__main__":
    main(cases)
