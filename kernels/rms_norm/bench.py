"""GB/s of add_rms_norm on a GPU, against torch: python -m llmc.kernels.rms_norm.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..gpu_bench import Case, main, random
from .reference import add_rms_norm_reference


def arguments(tokens: int, n: int) -> tuple[Any, ...]:
    return random(tokens, n), random(tokens, n), random(n), 1e-6, 0.0, True


def cases() -> Iterator[Case]:
    from .triton_impl import add_rms_norm

    def library(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *_: Any) -> Tensor:
        return F.rms_norm(x + residual, (x.shape[-1],), weight, eps)

    for tokens in (1, 64, 256, 2048, 8192):
        for n in (1024, 4096):
            yield Case(
                name=f"add_rms_norm {tokens}x{n}",
                make=partial(arguments, tokens, n),
                ours=add_rms_norm,
                moved_bytes=(4 * tokens + 1) * n * 2,
                baselines={"torch": library, "reference": add_rms_norm_reference},
            )


if __name__ == "__main__":
    main(cases)
