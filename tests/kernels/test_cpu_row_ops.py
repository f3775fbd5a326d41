"""The compiled rms_norm, add_rms_norm, silu_mul and gelu_mul against their references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmc.kernels.build import build_kernels
from llmc.kernels.gelu_mul import reference as gelu_mul
from llmc.kernels.isa import runnable_levels
from llmc.kernels.native import NativeKernels
from llmc.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from llmc.kernels.silu_mul import reference as silu_mul
from llmc.passes import TOLERANCES
from tests.kernels.paged_attention_world import kernel_cache

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 64), (3, 17), (2, 5, 40), (9, 1), (20, 1000), (33, 512)]


@pytest.fixture(scope="module", params=[level.name for level in runnable_levels()[:1] + runnable_levels()[-1:]])
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NativeKernels:
    return NativeKernels(build_kernels(request.param, kernel_cache(tmp_path_factory)).kernels_so, num_threads=2)


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def close(found: Tensor, expected: Tensor) -> None:
    within = TOLERANCES[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=within.rtol, atol=within.atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset, round_first", [(0.0, True), (1.0, False)])
def test_norms(native: NativeKernels, dtype: torch.dtype, shape: tuple[int, ...], offset: float, round_first: bool) -> None:
    x, residual = numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype, seed=1)
    for weight in (numbers(shape[-1], dtype=dtype, seed=2), numbers(shape[-1], dtype=torch.float32, seed=2)):
        rest = (weight, 1e-5, offset, round_first)
        close(native.rms_norm(x, *rest), rms_norm_reference(x, *rest))
        (normal, summed), (want, total) = native.add_rms_norm(x, residual, *rest), add_rms_norm_reference(x, residual, *rest)
        close(normal, want)
        assert torch.equal(summed, total)
        assert torch.equal(normal, native.rms_norm(summed, *rest)), "a sum and its norm have the bits of the two ops"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_activations(native: NativeKernels, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up = numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype, seed=1)
    close(native.silu_mul(gate, up), silu_mul(gate, up))
    for tanh in (False, True):
        close(native.gelu_mul(gate, up, tanh), gelu_mul(gate, up, tanh))


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_of_one_tensor(native: NativeKernels, dtype: torch.dtype) -> None:
    gate, up = numbers(7, 48, dtype=dtype).split([24, 24], -1)
    close(native.silu_mul(gate, up), silu_mul(gate, up))
    weight = torch.ones(24, dtype=dtype)
    close(native.rms_norm(up, weight, 1e-6, 0.0, True), rms_norm_reference(up, weight, 1e-6, 0.0, True))


def test_extreme_values(native: NativeKernels) -> None:
    x = torch.tensor([[-1e30, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e30, float("nan"), float("inf")]])
    one = torch.ones_like(x)
    for found, expected in ((native.silu_mul(x, one), silu_mul(x, one)), (native.gelu_mul(x, one, True), gelu_mul(x, one, True))):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_every_batch(native: NativeKernels, dtype: torch.dtype) -> None:
    x, up, weight = numbers(40, 700, dtype=dtype), numbers(40, 700, dtype=dtype, seed=1), numbers(700, dtype=dtype, seed=2)
    calls: list[Callable[[Any], Tensor]] = [
        lambda rows: native.silu_mul(x[rows], up[rows]),
        lambda rows: native.gelu_mul(x[rows], up[rows], True),
        lambda rows: native.rms_norm(x[rows], weight, 1e-6, 0.0, True),
    ]
    for call in calls:
        together = call(slice(None))
        for row in (0, 13, 39):
            assert torch.equal(call(slice(row, row + 1))[0], together[row])
