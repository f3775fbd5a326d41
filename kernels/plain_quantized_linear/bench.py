"""plain_quantized_linear on a GPU: GB/s for few rows, TFLOP/s for many, against torch's bf16 matmul with the dequantised matrix.

python -m llmc.kernels.plain_quantized_linear.bench
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gpu_bench import DEVICE, Case, main, random

MATRICES = ((6144, 1024), (1024, 3072), (28672, 4096), (4096, 14336))  # (N, K) of Qwen3-0.6B's and Llama-8B's widest layers
KINDS = {"int8": (torch.int8, 128), "int4": (torch.uint8, 64), "fp8": (torch.float8_e4m3fn, 128)}


def arguments(tokens: int, n: int, k: int, dtype: torch.dtype, group: int) -> tuple[Any, ...]:
    """The op's arguments, then a bf16 matrix of the same sizes for the baseline."""
    raw = torch.randint(0, 120, (n, k // 2 if dtype == torch.uint8 else k), device=DEVICE, dtype=torch.uint8)
    return random(tokens, k), raw.view(dtype), random(n, k // group), None, group, random(n, k)


def cases() -> Iterator[Case]:
    from .triton_impl import plain_quantized_linear

    def ours(*args: Any, **options: Any) -> Tensor:
        return plain_quantized_linear(*args[:-1], **options)

    for kind, (dtype, group) in KINDS.items():
        for n, k in MATRICES:
            stored = n * k // (2 if kind == "int4" else 1) + n * (k // group) * 2
            for tokens in (1, 16, 64, 2048):
                yield Case(
                    name=f"plain_quantized_linear {kind} {tokens}x{n}x{k}",
                    make=partial(arguments, tokens, n, k, dtype, group),
                    ours=ours,
                    moved_bytes=stored + tokens * (n + k) * 2,
                    flop=2 * tokens * n * k,
                    baselines={"torch bf16": lambda *args: F.linear(args[0], args[-1])},
                )


if __name__ == "__main__":
    main(cases)
