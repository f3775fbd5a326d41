"""plain_linear on a GPU: GB/s for few rows, TFLOP/s for many, against torch (cuBLAS): python -m llmc.kernels.plain_linear.bench"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gpu_bench import Case, main, random

if TYPE_CHECKING:  # triton stands behind it
    from .triton_impl import Tile

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


def check_bits(tokens: int, n: int, k: int, tile: Tile) -> None:
    """Compare a tile's result with `tile_for`'s.

    Raises:
        RuntimeError: a bit differs.
    """
    from .triton_impl import plain_linear

    x, weight, _ = arguments(tokens, n, k)
    assert x is not None and weight is not None
    if not torch.equal(plain_linear(x, weight, None, tile=tile), plain_linear(x, weight, None)):
        raise RuntimeError(f"plain_linear {tokens}x{n}x{k} has other bits with {tile}")


def cases() -> Iterator[Case]:
    from .triton_impl import plain_linear, tile_for
    from .tuning import TMA_CAPABILITY

    has_tma = not torch.cuda.is_available() or 10 * torch.cuda.get_device_capability()[0] >= TMA_CAPABILITY
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
            if has_tma and tokens in (256, 2048) and n < 100_000:
                yield Case(
                    name=f"plain_linear tma {tokens}x{n}x{k}",
                    make=partial(arguments, tokens, n, k),
                    ours=partial(plain_linear, tile=replace(tile_for(tokens, torch.bfloat16), tma=True)),
                    moved_bytes=(tokens * k + n * k + tokens * n) * 2,
                    flop=2 * tokens * n * k,
                )


if __name__ == "__main__":
    main(cases)
