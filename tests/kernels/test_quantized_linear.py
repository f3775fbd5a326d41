"""quantized_linear and quantized_embedding: the stated order of summation at every level, in every batch, to the bit."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from llmc.artifacts import recipes
from llmc.compiler.packing import dtype_name, to_numpy, to_torch
from llmc.errors import InternalError
from llmc.kernels.build import build_kernels
from llmc.kernels.isa import runnable_levels
from llmc.kernels.native import NativeKernels
from llmc.kernels.quantized_linear.reference import dequantize, unpack_quants

from .matmul_world import DTYPES, assert_close, random
from .paged_attention_world import kernel_cache

SHAPES = [(1, 1), (7, 2), (37, 45), (100, 64), (130, 257)]  # (N, K)
BITS = (8, 4)


@pytest.fixture(scope="module", params=[level.name for level in runnable_levels()])
def level(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def native(level: str, tmp_path_factory: pytest.TempPathFactory) -> NativeKernels:
    return NativeKernels(build_kernels(level, kernel_cache(tmp_path_factory)).kernels_so, num_threads=1)


def quantized(w: Tensor, bits: int, group: int = 32) -> tuple[Tensor, Tensor]:
    """Packed integers and scales of W [N, K], by the recipes that an artifact is packed with."""
    specs = {"w": (dtype_name(w.dtype), tuple(w.shape))}

    def made(op: str, dtype: torch.dtype) -> Tensor:
        recipe = {"op": op, "bits": bits, "group": group, "input": {"op": "source", "name": "w"}}
        return to_torch(recipes.evaluate(recipe, lambda _: to_numpy(w), specs), dtype)

    return made("quantize", torch.int8 if bits == 8 else torch.uint8), made("quantize_scales", w.dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_order_of_summation_is_the_stated_one(native: NativeKernels, n: int, k: int, dtype: torch.dtype, bits: int) -> None:
    for group in (32, 96, 1024):
        x, weight, scales, bias, sums = sums_in_order(n, k, dtype, bits, group)
        for m in (0, 1, 2, 3, 5, 16, 17, 33, 70):
            assert torch.equal(native.quantized_linear(x[:m], weight, scales, None, n, group), sums[:m].to(dtype)), (m, group)
            with_bias = native.quantized_linear(x[:m], weight, scales, bias, n, group)
            assert torch.equal(with_bias, (sums[:m] + bias.float()).to(dtype)), (m, group)


@functools.cache  # the levels share it
def sums_in_order(n: int, k: int, dtype: torch.dtype, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [70, K], weight, scales, bias, and the fp32 sums [70, N]."""
    x, bias = random(70, k, dtype=dtype, seed=2), random(n, dtype=dtype, seed=1)
    weight, scales = quantized(random(n, k, dtype=dtype) / 7, bits, group)
    return x, weight, scales, bias, in_order(x, weight, scales, n, group)


def in_order(x: Tensor, weight: Tensor, scales: Tensor, n: int, group: int) -> Tensor:
    """The fp32 sums [M, n] in the order that every kernel keeps: even and odd depths of a step of 32 apart, steps, groups.

    A product of fp32 numbers is exact in fp64, and adding one to another fp32 number there errs far below half a unit of fp32's last
    place, so that rounding to fp32 after each step is a fused multiply-add but for the rarest of ties.
    """
    m, k = x.shape
    steps = -(-k // 32)
    wide = torch.nn.functional.pad(x.double(), (0, steps * 32 - k)).view(m, 1, steps, 32)
    quants = torch.nn.functional.pad(unpack_quants(weight, n, k).double(), (0, steps * 32 - k)).view(1, n, steps, 32)
    factors = scales.transpose(1, 2).reshape(scales.shape[0] * 16, -1)[:n].double()
    total = torch.zeros(m, n, dtype=torch.float32)
    for first in range(0, steps, group // 32):
        in_group = torch.zeros(m, n, dtype=torch.float32)
        for step in range(first, min(first + group // 32, steps)):
            even, odd = torch.zeros(2, m, n, dtype=torch.float32)
            for j in range(0, 32, 2):
                even = (even + wide[..., step, j] * quants[..., step, j]).float()
                odd = (odd + wide[..., step, j + 1] * quants[..., step, j + 1]).float()
            in_group = in_group + (even + odd)
        total = (factors[:, first * 32 // group] * in_group + total).float()
    return total


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_reference(native: NativeKernels, dtype: torch.dtype, bits: int) -> None:
    w, x, bias = random(48, 200, dtype=dtype), random(3, 4, 200, dtype=dtype, seed=1), random(48, dtype=dtype, seed=2)
    weight, scales = quantized(w, bits, 64)
    reference = torch.ops.llmc.quantized_linear(x, weight, scales, bias, 48, 64)
    assert reference.shape == (3, 4, 48)
    assert_close(native.quantized_linear(x, weight, scales, bias, 48, 64), reference.double(), 200)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_alone_in_any_batch_and_with_any_threads(native: NativeKernels, dtype: torch.dtype, bits: int) -> None:
    n, k = 330, 512
    weight, scales = quantized(random(n, k, dtype=dtype), bits)
    x = random(40, k, dtype=dtype, seed=2)
    alone = torch.cat([native.quantized_linear(x[i : i + 1], weight, scales, None, n, 32) for i in range(40)])
    for m in (2, 7, 16, 17, 33, 40):
        assert torch.equal(native.quantized_linear(x[:m], weight, scales, None, n, 32), alone[:m]), f"batch of {m}"
    many = native.quantized_linear(x.repeat(18, 1), weight, scales, None, n, 32)
    assert torch.equal(many, alone.repeat(18, 1))
    native.num_threads = 2
    try:
        assert torch.equal(native.quantized_linear(x[:5], weight, scales, None, n, 32), alone[:5])
        assert torch.equal(native.quantized_linear(x, weight, scales, None, n, 32), alone)
    finally:
        native.num_threads = 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 45, 96])
def test_embedding_gives_the_dequantised_rows(native: NativeKernels, k: int, dtype: torch.dtype, bits: int) -> None:
    weight, scales = quantized(random(37, k, dtype=dtype), bits)
    rows = dequantize(weight, scales, 37, k, 32)
    ids = torch.tensor([[0, 36, 5], [16, 15, 5]])
    assert torch.equal(native.quantized_embedding(ids, weight, scales, k, 32), rows[ids])
    assert torch.equal(torch.ops.llmc.quantized_embedding(ids, weight, scales, k, 32), rows[ids])
    assert native.quantized_embedding(ids[:0], weight, scales, k, 32).shape == (0, 3, k)


def test_refusals(native: NativeKernels) -> None:
    x = random(1, 64, dtype=torch.float32)
    weight, scales = quantized(random(16, 64, dtype=torch.float32), 8)
    with pytest.raises(InternalError, match="bad shape"):
        native.quantized_linear(x, weight, scales, None, 16, 48)
    with pytest.raises(InternalError, match="index out of range"):
        native.quantized_embedding(torch.tensor([48]), weight, scales, 64, 32)
    assert native.library.llmc_quantized_linear(None) == 1
    for group, says in ((48, "multiple of 32"), (64, "scales")):
        with pytest.raises(RuntimeError, match=says):
            torch.ops.llmc.quantized_linear(x, weight, scales, None, 16, group)
    with pytest.raises(RuntimeError, match="int8"):
        torch.ops.llmc.quantized_linear(x, weight.float(), scales, None, 16, 32)
    with pytest.raises(RuntimeError, match="bias"):
        torch.ops.llmc.quantized_linear(x, weight, scales, torch.ones(3), 16, 32)
    with pytest.raises(IndexError):
        torch.ops.llmc.quantized_embedding(torch.tensor([-1]), weight, scales, 64, 32)
