"""plain_linear and argmax in Triton: parity with the references, and one row's bits at every size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmc.kernels.argmax import argmax_reference
from llmc.kernels.argmax.triton_impl import argmax, argmax_reason
from llmc.kernels.launch import H200, Device, Launch, run
from llmc.kernels.plain_linear import plain_linear_reference
from llmc.kernels.plain_linear.triton_impl import plain_linear, plain_linear_reason, split_length, tile_for

from .world import DTYPES, INTERPRETED, assert_close, poisoned, random, same_bits


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, n, k", [(0, 16, 16), (1, 1, 1), (3, 70, 100), (17, 33, 64), (65, 130, 90)])
def test_plain_linear(dtype: torch.dtype, tokens: int, n: int, k: int) -> None:
    x, weight, bias = random(tokens, k, dtype=dtype), random(n, k, dtype=dtype), random(n, dtype=dtype)
    with poisoned():
        without, added = plain_linear(x, weight, None), plain_linear(x, weight, bias)
    assert_close(without, plain_linear_reference(x, weight, None))
    assert_close(added, plain_linear_reference(x, weight, bias))


def test_a_split_sum_with_strides() -> None:
    x, weight, bias = random(2, 3, 3000, dtype=torch.bfloat16)[..., :2100], random(20, 2112, dtype=torch.bfloat16)[:, :2100], random(20)
    bias = bias.bfloat16()
    assert split_length(20, 2100, 64, H200) == 576  # 33 steps in 4 parts
    with poisoned():
        found = plain_linear(x, weight, bias)
    assert_close(found, plain_linear_reference(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # fp32 shows an order of summation that rounding would hide
@pytest.mark.parametrize("split", [False, True])
def test_a_row_of_plain_linear_has_the_same_bits_at_every_size(split: bool, dtype: torch.dtype) -> None:
    """1, 17 and 64 rows are decoded with tiles of 16, 32 and 64 rows; 70 and 600 are prefilled with two kinds of tiles."""
    n, k, device = (24, 1040, H200) if split else (130, 72, Device(num_sms=1))
    assert (split_length(n, k, tile_for(1, dtype).block_k, device) < k) is split
    x, weight, bias = random(600, k, dtype=dtype), random(n, k, dtype=dtype), random(n, dtype=dtype)
    whole = plain_linear(x, weight, bias, device=device)
    for rows in (slice(0, 1), slice(599, 600), slice(3, 20), slice(10, 74), slice(500, 570)):
        assert same_bits(plain_linear(x[rows], weight, bias, device=device), whole[rows])


@pytest.mark.skipif(not INTERPRETED and torch.cuda.get_device_capability()[0] < 9, reason="this GPU has no TMA")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens, n, k, sms", [(70, 70, 96, 1), (130, 24, 1056, 132), (600, 33, 104, 4)])
def test_loads_by_tma_change_no_bit(tokens: int, n: int, k: int, sms: int, dtype: torch.dtype) -> None:
    """One part and several, whole tiles and not, programs of one tile and of many; rows that TMA cannot address go without."""
    x, weight, bias = random(tokens, k, dtype=dtype), random(n, k, dtype=dtype), random(n, dtype=dtype)
    device, tile = Device(num_sms=sms), replace(tile_for(tokens, dtype), tma=True)
    kernels = []

    def noted(launch: Launch) -> None:
        kernels.append(launch.kernel.__name__)
        run(launch)

    with poisoned():
        found = plain_linear(x, weight, bias, tile=tile, device=device, launch=noted)
    assert same_bits(found, plain_linear(x, weight, bias, device=device))
    unaligned = random(n, k + 1, dtype=dtype)[:, :k]
    again = plain_linear(x, unaligned, bias, tile=tile, device=device, launch=noted)
    assert same_bits(again, plain_linear(x, unaligned, bias, device=device))
    assert kernels == ["prefill_tma_kernel", "prefill_kernel"]


def test_parts_of_k_depend_on_the_matrix_alone() -> None:
    assert [split_length(n, k, 64, H200) for n, k in ((4096, 4096), (28672, 4096), (4096, 14336), (1024, 1024), (151936, 1024))] == [
        1024, 4096, 3584, 512, 1024
    ]  # fmt: skip
    assert {tile_for(m, torch.bfloat16).block_k for m in (1, 16, 64, 65, 4096)} == {64}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, vocab", [(0, 7), (1, 1), (3, 100), (2, 4097), (2, 9001)])
def test_argmax(dtype: torch.dtype, rows: int, vocab: int) -> None:
    logits = random(rows, vocab, dtype=dtype).mul(4).round()  # many equals
    with poisoned():
        assert torch.equal(argmax(logits), argmax_reference(logits))


def test_argmax_of_odd_rows() -> None:
    """The lowest of equals across runs; infinities; NaN never wins; a row of nothing else gives 0."""
    logits = random(6, 9001)
    logits[0, [4000, 5000, 9000]] = 99.0
    logits[1] = float("-inf")
    logits[2] = float("nan")
    logits[3, 17], logits[3, 8000] = float("nan"), 99.0
    logits[4, [8999, 9000]] = float("inf")
    logits[5] = -0.0
    logits[5, 4500] = 0.0
    assert argmax(logits).tolist() == argmax_reference(logits).tolist() == [4000, 0, 0, 8000, 8999, 0]
    assert argmax(logits[:, 4100:4200]).tolist() == argmax_reference(logits[:, 4100:4200]).tolist()


def test_what_is_refused() -> None:
    x = random(4, 8)
    assert "contiguous along" in str(plain_linear_reason(x, random(8, 4).t(), None))
    assert "one dtype" in str(plain_linear_reason(x, random(4, 8).half(), None))
    assert "empty" in str(plain_linear_reason(x, random(0, 8), None))
    assert "contiguous" in str(argmax_reason(x.t()))
