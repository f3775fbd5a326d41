"""quantized_linear and quantized_embedding: the bits of linear on the dequantised matrix, at every level, in every batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmc.artifacts import recipes
from llmc.compiler.packing import dtype_name, to_numpy, to_torch
from llmc.errors import InternalError
from llmc.kernels import ops
from llmc.kernels.build import build_kernels
from llmc.kernels.isa import runnable_levels
from llmc.kernels.native import NativeKernels
from llmc.kernels.quantized_linear.reference import dequantize

from .matmul_world import DTYPES, assert_close, packed, random
from .paged_attention_world import kernel_cache

SHAPES = [(1, 1), (7, 2), (37, 45), (100, 64), (130, 257)]  # (N, K)
BITS = (8, 4)


@pytest.fixture(scope="module", params=[level.name for level in runnable_levels()])
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NativeKernels:
    return NativeKernels(build_kernels(request.param, kernel_cache(tmp_path_factory), ops=ops.COMPILED).kernels_so, num_threads=1)


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
def test_the_same_bits_as_linear_on_the_dequantised_matrix(native: NativeKernels, n: int, k: int, dtype: torch.dtype, bits: int) -> None:
    bias = random(n, dtype=dtype, seed=1)
    weight, scales = quantized(random(n, k, dtype=dtype) / 7, bits)
    plain = packed(dequantize(weight, scales, n, k, 32))
    for m in (0, 1, 2, 5, 16, 17, 33, 70):
        x = random(m, k, dtype=dtype, seed=m)
        assert torch.equal(native.quantized_linear(x, weight, scales, None, n, 32), native.linear(x, plain, None, n)), m
        assert torch.equal(native.quantized_linear(x, weight, scales, bias, n, 32), native.linear(x, plain, bias, n)), m


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
