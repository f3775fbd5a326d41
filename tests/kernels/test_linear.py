"""linear: parity with the exact sum, and the promise that a row's bits depend on nothing but the row, the weights and K."""

from __future__ import annotations

import pytest
import torch

from llmc.kernels import ops
from llmc.kernels.build import build_kernels
from llmc.kernels.isa import runnable_levels
from llmc.kernels.native import NativeKernels

from .matmul_world import DTYPES, assert_close, native_fixture, packed, random
from .paged_attention_world import kernel_cache

native = native_fixture()
SHAPES = [(1, 1), (7, 2), (16, 32), (37, 45), (100, 64), (130, 257)]  # (N, K)


@pytest.fixture(autouse=True)
def one_thread(native: NativeKernels) -> None:
    native.num_threads = 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_agrees_with_the_exact_sum(native: NativeKernels, n: int, k: int, dtype: torch.dtype) -> None:
    w, bias = random(n, k, dtype=dtype), random(n, dtype=dtype, seed=1)
    for m in (0, 1, 2, 5, 13, 16, 17, 33, 70):
        x = random(m, k, dtype=dtype, seed=m)
        exact = x.double() @ w.double().t()
        assert_close(native.linear(x, packed(w), None, n), exact, k)
        assert_close(native.linear(x, packed(w), bias, n), exact + bias.double(), k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_reference(native: NativeKernels, dtype: torch.dtype) -> None:
    w, x, bias = random(48, 96, dtype=dtype), random(3, 4, 96, dtype=dtype, seed=1), random(48, dtype=dtype, seed=2)
    reference = torch.ops.llmc.linear(x, packed(w), bias, 48)
    assert reference.shape == (3, 4, 48)
    assert_close(native.linear(x, packed(w), bias, 48), reference.double(), 96)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(37, 45), (130, 256), (64, 1024)])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(native: NativeKernels, n: int, k: int, dtype: torch.dtype) -> None:
    w, bias = packed(random(n, k, dtype=dtype)), random(n, dtype=dtype, seed=1)
    x = random(40, k, dtype=dtype, seed=2)
    alone = torch.cat([native.linear(x[i : i + 1], w, bias, n) for i in range(40)])
    for m in range(2, 41):
        assert torch.equal(native.linear(x[:m], w, bias, n), alone[:m]), f"batch of {m}"
    assert torch.equal(native.linear(x[21:38], w, bias, n), alone[21:38]), "another place in the batch"
    many = native.linear(x.repeat(18, 1), w, bias, n)  # more rows than one block holds
    assert torch.equal(many, alone.repeat(18, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_and_threads_do_not_change_bits(native: NativeKernels, dtype: torch.dtype) -> None:
    n, k = 330, 512
    w, bias = random(n, k, dtype=dtype), random(n, dtype=dtype, seed=1)
    for m in (1, 3, 40, 130):
        x = random(m, k, dtype=dtype, seed=m)
        y = native.linear(x, packed(w), bias, n)
        for part in (1, 16, 100, 215):
            assert torch.equal(native.linear(x, packed(w[:part]), bias[:part], part), y[:, :part]), f"first {part} columns"
        for threads in (2, 5):
            native.num_threads = threads
            assert torch.equal(native.linear(x, packed(w), bias, n), y), f"{threads} threads"
        native.num_threads = 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_columns_and_many_rows_are_shared_out_by_rows(native: NativeKernels, dtype: torch.dtype) -> None:
    w, x = packed(random(20, 512, dtype=dtype)), random(300, 512, dtype=dtype, seed=1)
    y = native.linear(x, w, None, 20)
    native.num_threads = 2
    assert torch.equal(native.linear(x, w, None, 20), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_lie_apart(native: NativeKernels, dtype: torch.dtype) -> None:
    w, wide = packed(random(48, 64, dtype=dtype)), random(21, 200, dtype=dtype, seed=1)
    for m in (1, 3, 21):
        x = wide[:m, 7:71]
        assert torch.equal(native.linear(x, w, None, 48), native.linear(x.contiguous(), w, None, 48))


def test_padding_of_k_reads_nothing_beyond_the_row(native: NativeKernels) -> None:
    """K is padded to 32 in the weights; a NaN behind the row's end must not reach the sum through a zero weight."""
    x = torch.full((3, 64), float("nan"), dtype=torch.bfloat16)
    x[:, :45] = 1.0
    y = native.linear(x[:, :45], packed(torch.ones(4, 45, dtype=torch.bfloat16)), None, 4)
    assert torch.equal(y, torch.full((3, 4), 45.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_row(native: NativeKernels, dtype: torch.dtype) -> None:
    x, w = random(20, 64, dtype=dtype), packed(random(32, 64, dtype=dtype, seed=1))
    clean = native.linear(x, w, None, 32)
    x[3, 5], x[17, 0] = float("nan"), float("inf")
    y = native.linear(x, w, None, 32)
    assert y[3].isnan().all() and not y[17].isfinite().any()
    others = [i for i in range(20) if i not in (3, 17)]
    assert torch.equal(y[others], clean[others])


def test_one_rounding_with_bias(native: NativeKernels) -> None:
    """256 + 1 is not a bf16 number; rounded before the bias is added, the 1 would be lost."""
    x, w = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16)
    assert native.linear(x, packed(w), torch.tensor([1.0], dtype=torch.bfloat16), 1).item() == 258.0


def test_refuses_a_foreign_struct_and_dtype(native: NativeKernels) -> None:
    with pytest.raises(KeyError):
        native.linear(torch.ones(1, 4, dtype=torch.float64), torch.ones(1, 4, 16), None, 1)
    assert native.library.llmc_linear(None) == 1


def test_compiled_kernels_replace_the_references_while_asked(tmp_path_factory: pytest.TempPathFactory) -> None:
    built = build_kernels(runnable_levels()[-1].name, kernel_cache(tmp_path_factory))
    x, w = random(3, 1001, dtype=torch.float32), packed(random(100, 1001, dtype=torch.float32, seed=1))
    reference = torch.ops.llmc.linear(x, w, None, 100)
    with ops.use_compiled(built.kernels_so, num_threads=1) as native:
        assert torch.equal(torch.ops.llmc.linear(x, w, None, 100), native.linear(x, w, None, 100))
    assert torch.equal(torch.ops.llmc.linear(x, w, None, 100), reference)
