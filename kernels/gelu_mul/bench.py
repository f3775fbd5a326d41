"""GB/s of gelu_mul on the halves of one tensor on a GPU, against torch: python -m llmc.kernels.gelu_mul.bench"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F

from ..gpu_bench import Case, main
from ..silu_mul.bench import halves


def arguments(tokens: int, n: int) -> tuple[Any, ...]:
    return *halves(tokens, n), True


def cases() -> Iterator[Case]:
    from .triton_impl import gelu_mul

    for tokens in (1, 256, 8192):
        yield Case(
            name=f"gelu_mul tanh {tokens}x9216",
            make=partial(arguments, tokens, 9216),
            ours=gelu_mul,
            moved_bytes=3 * tokens * 9216 * 2,
            baselines={"torch": lambda gate, up, _: F.gelu(gate, approximate="tanh") * up},
        )


if __name__ == "__main__":
    main(cases)
