"""GB/s of silu_mul on the halves of one tensor on a GPU, against torch: python -m llmc.kernels.silu_mul.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gpu_bench import Case, main, random


def halves(tokens: int, n: int) -> tuple[Tensor, ...]:
    return torch.split(random(tokens, 2 * n), n, dim=1)


def cases() -> Iterator[Case]:
    from .triton_impl import silu_mul

    for tokens in (1, 64, 256, 2048, 8192):
        for n in (3072, 14336):
            yield Case(
                name=f"silu_mul {tokens}x{n}",
                make=partial(halves, tokens, n),
                ours=silu_mul,
                moved_bytes=3 * tokens * n * 2,
                baselines={"torch": lambda gate, up: F.silu(gate) * up},
            )


if __name__ == "__main__":
    main(cases)
