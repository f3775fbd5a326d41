"""rms_norm, add_rms_norm, silu_mul and gelu_mul in Triton against their references."""

from __future__ import annotations

import pytest
import torch

from llmc.kernels.gelu_mul.triton_impl import gelu_mul, gelu_mul_reason
from llmc.kernels.registry import choose
from llmc.kernels.rms_norm.triton_impl import add_rms_norm, add_rms_norm_reason, rms_norm, rms_norm_reason
from llmc.kernels.silu_mul.triton_impl import gated_reason, silu_mul

from llmc.kernels.gelu_mul import gelu_mul_reference  # isort: skip
from llmc.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference  # isort: skip
from llmc.kernels.silu_mul import silu_mul_reference  # isort: skip

from .world import DTYPES, assert_close, poisoned, random, same_bits

SIZES = [(0, 64), (1, 1), (1, 96), (5, 257), (33, 128), (2, 3, 130)]
CONVENTIONS = [(0.0, True), (1.0, False), (0.0, False)]  # Llama, Gemma, gpt-oss


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset, round_first", CONVENTIONS)
def test_rms_norm(dtype: torch.dtype, offset: float, round_first: bool) -> None:
    for sizes in SIZES:
        x, residual, weight = random(*sizes, dtype=dtype), random(*sizes, dtype=dtype), random(sizes[-1], dtype=dtype)
        with poisoned():
            out = rms_norm(x, weight, 1e-6, offset, round_first)
            normed, summed = add_rms_norm(x, residual, weight, 1e-6, offset, round_first)
        assert_close(out, rms_norm_reference(x, weight, 1e-6, offset, round_first))
        expected, expected_sum = add_rms_norm_reference(x, residual, weight, 1e-6, offset, round_first)
        assert same_bits(summed, expected_sum)
        assert_close(normed, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates(dtype: torch.dtype) -> None:
    for sizes in [*SIZES, (3, 1500)]:
        gate, up = random(*sizes, dtype=dtype, scale=3), random(*sizes, dtype=dtype)
        with poisoned():
            silu, exact, tanh = silu_mul(gate, up), gelu_mul(gate, up, False), gelu_mul(gate, up, True)
        assert_close(silu, silu_mul_reference(gate, up))
        assert_close(exact, gelu_mul_reference(gate, up, False))
        assert_close(tanh, gelu_mul_reference(gate, up, True))


def test_gates_at_the_ends_of_the_range() -> None:
    gate = random(1, 6) * 0 + torch.tensor([-1e4, -100.0, -0.0, 1e-30, 100.0, 1e4], device=random(1).device)
    up = torch.ones_like(gate)
    for found, expected in [
        (silu_mul(gate, up), silu_mul_reference(gate, up)),
        (gelu_mul(gate, up, True), gelu_mul_reference(gate, up, True)),
        (gelu_mul(gate, up, False), gelu_mul_reference(gate, up, False)),
    ]:
        assert found.isfinite().all()
        assert_close(found, expected)


def test_halves_of_one_tensor_and_other_strides() -> None:
    merged = random(7, 2 * 90, dtype=torch.bfloat16)
    gate, up = merged[:, :90], merged[:, 90:]
    assert gated_reason(gate, up) is None
    with poisoned():
        assert same_bits(silu_mul(gate, up), silu_mul(gate.contiguous(), up.contiguous()))
        assert same_bits(gelu_mul(gate, up, True), gelu_mul(gate.contiguous(), up.contiguous(), True))
        weight = random(90, dtype=torch.bfloat16)
        assert same_bits(rms_norm(up, weight, 1e-6, 0.0, True), rms_norm(up.contiguous(), weight, 1e-6, 0.0, True))
        one, other = add_rms_norm(gate, up, weight, 1e-6, 0.0, True), add_rms_norm(gate.clone(), up.clone(), weight, 1e-6, 0.0, True)
    assert same_bits(one, other)


def test_a_row_has_the_same_bits_at_every_size() -> None:
    x, y, weight = random(37, 200, dtype=torch.bfloat16), random(37, 200, dtype=torch.bfloat16), random(200, dtype=torch.bfloat16)
    whole = [*add_rms_norm(x, y, weight, 1e-5, 0.0, True), silu_mul(x, y), gelu_mul(x, y, True)]
    for rows in (slice(0, 1), slice(36, 37), slice(5, 21)):
        part = [*add_rms_norm(x[rows], y[rows], weight, 1e-5, 0.0, True), silu_mul(x[rows], y[rows]), gelu_mul(x[rows], y[rows], True)]
        assert same_bits(part, [w[rows] for w in whole])


def test_what_is_refused() -> None:
    x = random(4, 8)
    assert "contiguous along" in str(rms_norm_reason(x.t(), random(4), 1e-6, 0.0, True))
    assert "no common stride" in str(rms_norm_reason(random(4, 5, 8)[:, :3], random(8), 1e-6, 0.0, True))
    assert "expected one dtype" in str(gelu_mul_reason(x.double(), x.double(), True))
    assert "expected one dtype" in str(add_rms_norm_reason(x, x.half(), random(8), 1e-6, 0.0, True))
    assert "columns" in str(rms_norm_reason(random(1, 20000), random(20000), 1e-6, 0.0, True))
    assert choose("rms_norm", x, random(8), 1e-6, 0.0, True).name == "triton"
