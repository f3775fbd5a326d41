"""The meaning of llmc::plain_quantized_linear in plain torch, its fake rule, and the form of its weights.

The weights mean what those of llmc::quantized_linear mean (an integer times a scale of its row and group of inputs, rounded once to
x's dtype); only their place in memory is another, since a GPU reads rows and a CPU reads panels:
    8 bits   int8 or float8_e4m3fn [N, K]
    4 bits   uint8 [N, ceil(K / 64) * 32]: of each run of 64 inputs, byte j holds input j in its low half and input 32 + j in its high
             half, 8 added; inputs past K are 0 (the byte 0x88). So both halves of a run are read without a shuffle.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plain_linear.reference import plain_linear_reference

SCHEMA = "plain_quantized_linear(Tensor x, Tensor weight, Tensor scales, Tensor? bias, int group) -> Tensor"
RUN = 64  # inputs that the bytes of 4-bit weights hold together
HALF = 32  # a scale never changes inside half a run
MAX_FP8 = 448.0  # largest float8_e4m3fn
_TOP = {torch.int8: 127.0, torch.uint8: 7.0, torch.float8_e4m3fn: MAX_FP8}


def quantize_plain(weight: Tensor, dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor]:
    """Bring a matrix [N, K] into the op's form, to nearest, a group's largest magnitude at the end of the range.

    dtype: int8, float8_e4m3fn, or uint8 for 4 bits. Returns (weight, scales [N, ceil(K / group)] in the matrix's dtype).
    """
    n, k = weight.shape
    groups = -(-k // group)
    wide = F.pad(weight.float(), (0, groups * group - k)).view(n, groups, group)
    scales = (wide.abs().amax(2) / _TOP[dtype]).clamp_min(torch.finfo(weight.dtype).tiny).to(weight.dtype)
    ratio = (wide / scales.float()[:, :, None]).view(n, -1)[:, :k].clamp(-_TOP[dtype], _TOP[dtype])
    if dtype == torch.float8_e4m3fn:
        return ratio.to(dtype), scales
    integers = ratio.round().to(torch.int8)
    return (_pack_4_bits(integers) if dtype == torch.uint8 else integers), scales


def dequantize_plain(weight: Tensor, scales: Tensor, k: int, group: int) -> Tensor:
    """The matrix [N, k] that weight and scales stand for, in the dtype of `scales`."""
    if weight.dtype == torch.uint8:
        runs = weight.view(weight.shape[0], -1, HALF).to(torch.int32)
        weight = torch.cat([runs & 15, runs >> 4], dim=2).flatten(1)[:, :k] - 8
    spread = scales.float().repeat_interleave(group, dim=1)[:, :k]
    return (weight.float() * spread).to(scales.dtype)


def plain_quantized_linear_reference(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """plain_linear with the matrix that weight and scales stand for.

    x: [..., K]; weight: as above; scales: [N, ceil(K / group)], group a multiple of 32; bias: [N] or None; x, scales and bias of one
    dtype. Returns [..., N] in it.
    """
    check_plain_quantized(x, weight, scales, bias, group)
    return plain_linear_reference(x, dequantize_plain(weight, scales, x.shape[-1], group), bias)


def plain_quantized_linear_fake(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """Shape rule: [..., K] -> [..., N]."""
    check_plain_quantized(x, weight, scales, bias, group)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def check_plain_quantized(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, group: int) -> None:
    """Refuse what no implementation takes."""
    name, k = "llmc::plain_quantized_linear", x.shape[-1]
    if group < HALF or group % HALF:
        raise RuntimeError(f"{name}: group must be a positive multiple of {HALF}, got {group}")
    columns = -(-k // RUN) * HALF if weight.dtype == torch.uint8 else k
    if weight.dtype not in _TOP or weight.dim() != 2 or weight.shape[1] != columns:
        raise RuntimeError(
            f"{name}: weight for {k} inputs must be int8 or float8_e4m3fn [N, {k}] or uint8 [N, {-(-k // RUN) * HALF}], "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    expected = (weight.shape[0], -(-k // group))
    if tuple(scales.shape) != expected or scales.dtype != x.dtype:
        raise RuntimeError(f"{name}: scales must be {x.dtype} {list(expected)}, got {scales.dtype} {list(scales.shape)}")
    if bias is not None and (tuple(bias.shape) != (weight.shape[0],) or bias.dtype != x.dtype):
        raise RuntimeError(f"{name}: bias must be {x.dtype} [{weight.shape[0]}], got {bias.dtype} {list(bias.shape)}")


def _pack_4_bits(integers: Tensor) -> Tensor:
    """int8 [N, K] in -8..7 -> uint8 [N, ceil(K / 64) * 32]."""
    n, k = integers.shape
    runs = (F.pad(integers.to(torch.int32), (0, -k % RUN)) + 8).view(n, -1, 2, HALF)
    return (runs[:, :, 0] | runs[:, :, 1] << 4).to(torch.uint8).flatten(1)
