"""plain_quantized_linear in Triton: parity, the bits of plain_linear with the dequantised matrix, one row's bits at every size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmc.kernels.launch import H200, Device
from llmc.kernels.plain_linear.triton_impl import plain_linear, split_length
from llmc.kernels.plain_quantized_linear import dequantize_plain, plain_quantized_linear_reference, quantize_plain
from llmc.kernels.plain_quantized_linear.triton_impl import plain_quantized_linear, plain_quantized_linear_reason

from .world import DEVICE, DTYPES, assert_close, poisoned, random, same_bits

KINDS = (torch.int8, torch.uint8, torch.float8_e4m3fn)  # uint8: 4 bits


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def matrix(n: int, k: int, dtype: torch.dtype, kind: torch.dtype, group: int) -> tuple[Tensor, Tensor]:
    weight, scales = quantize_plain(random(n, k, dtype=dtype).cpu(), kind, group)
    return weight.to(DEVICE), scales.to(DEVICE)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("group", [32, 96])
def test_quantising_comes_close(kind: torch.dtype, group: int) -> None:
    w = random(9, 100).cpu()
    weight, scales = quantize_plain(w, kind, group)
    step = scales.repeat_interleave(group, 1)[:, :100] * (16 if kind == torch.float8_e4m3fn else 0.5)
    assert ((dequantize_plain(weight, scales, 100, group) - w).abs() <= step * 1.001).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_parity_and_the_bits_of_the_plain_matrix(dtype: torch.dtype, kind: torch.dtype) -> None:
    for tokens, n, k, group in ((0, 16, 64, 64), (1, 1, 1, 32), (3, 70, 100, 32), (17, 33, 160, 96), (65, 40, 200, 128)):
        x, bias = random(tokens, k, dtype=dtype), random(n, dtype=dtype)
        weight, scales = matrix(n, k, dtype, kind, group)
        with poisoned():
            without = plain_quantized_linear(x, weight, scales, None, group)
            added = plain_quantized_linear(x, weight, scales, bias, group)
        assert_close(without, plain_quantized_linear_reference(x, weight, scales, None, group))
        assert_close(added, plain_quantized_linear_reference(x, weight, scales, bias, group))
        assert same_bits(added, plain_linear(x, dequantize_plain(weight, scales, k, group), bias))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("split", [False, True])
def test_a_row_has_the_same_bits_at_every_size(split: bool, kind: torch.dtype) -> None:
    """1, 17 and 64 rows are decoded with three kinds of tiles, 70 and 520 prefilled with two; split: K in more than one part."""
    n, k, device = (24, 1056, H200) if split else (70, 96, Device(num_sms=1))
    assert (split_length(n, k, 64, device) < k) is split
    x, (weight, scales) = random(520, k), matrix(n, k, torch.float32, kind, 96)
    whole = plain_quantized_linear(x, weight, scales, None, 96, device=device)
    for rows in (slice(0, 1), slice(519, 520), slice(3, 20), slice(10, 74), slice(440, 510)):
        assert same_bits(plain_quantized_linear(x[rows], weight, scales, None, 96, device=device), whole[rows])


def test_what_is_refused() -> None:
    x, (weight, scales) = random(4, 64), matrix(8, 64, torch.float32, torch.int8, 32)
    assert plain_quantized_linear_reason(x, weight, scales, None, 32) is None
    assert "one dtype" in str(plain_quantized_linear_reason(x.half(), weight, scales, None, 32))
    assert "contiguous along" in str(plain_quantized_linear_reason(x, weight.t(), scales, None, 32))
    with pytest.raises(RuntimeError, match=r"int8 or float8_e4m3fn \[N, 64\] or uint8 \[N, 32\]"):
        plain_quantized_linear_reference(x, weight[:, :60], scales, None, 32)
    with pytest.raises(RuntimeError, match="multiple of 32"):
        plain_quantized_linear_reference(x, weight, scales, None, 16)
