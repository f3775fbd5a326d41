"""How far two computations of one value may lie apart, per dtype. The one table of the repository; tests import it too.

A value passes if |found - expected| <= atol + rtol * |expected|. fp32: the order of a sum of a few thousand terms changes the last
three or four bits. bf16 and fp16 keep 8 and 11 bits, and a fused op rounds once where its parts round two or three times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tolerance:
    rtol: float
    atol: float


TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(rtol=1e-12, atol=1e-12),
    torch.float32: Tolerance(rtol=1e-5, atol=1e-5),
    torch.float16: Tolerance(rtol=4e-3, atol=4e-3),  # two units in the last place of 11 bits, relative to values near 1
    torch.bfloat16: Tolerance(rtol=1.6e-2, atol=1.6e-2),  # two units in the last place of 8 bits
}


@dataclass(frozen=True, slots=True)
class LogitsTolerance:
    """Of a whole model in a narrow dtype: its distance from the answer in fp32, as a multiple of Hugging Face's distance in that dtype."""

    rms: float
    largest: float


LOGITS: dict[torch.dtype, LogitsTolerance] = {
    # llmc's products round once from fp32, so most architectures come out at 0.7; single values are a matter of chance
    torch.bfloat16: LogitsTolerance(rms=1.1, largest=1.6),
}
