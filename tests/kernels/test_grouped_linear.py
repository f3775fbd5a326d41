"""grouped_linear: each row has the bits that linear gives it with its expert's weight."""

from __future__ import annotations

import pytest
import torch

from llmc.errors import InternalError
from llmc.kernels import ops  # noqa: F401  (registers the ops)
from llmc.kernels.native import NativeKernels

from .matmul_world import DTYPES, assert_close, native_fixture, packed, random

native = native_fixture()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [0, 1, 8, 45, 700])
def test_row_bits_are_those_of_linear(native: NativeKernels, m: int, dtype: torch.dtype) -> None:
    experts, n, k = 5, 40, 96
    w, bias, x = random(experts, n, k, dtype=dtype), random(experts, n, dtype=dtype, seed=1), random(m, k, dtype=dtype, seed=2)
    ids = torch.randint(0, experts - 1, (m,), generator=torch.Generator().manual_seed(m))  # one expert without rows
    for threads in (1, 2):
        native.num_threads = threads
        y = native.grouped_linear(x, packed(w), ids, bias, n)
        native.num_threads = 1
        assert y.shape == (m, n)
        for expert in ids.unique().tolist():
            rows = ids == expert
            assert torch.equal(y[rows], native.linear(x[rows], packed(w[expert]), bias[expert], n))
    assert_close(y, torch.ops.llmc.grouped_linear(x, packed(w), ids, bias, n).double(), k)


def test_without_bias_and_with_rows_apart(native: NativeKernels) -> None:
    w, wide = random(3, 20, 64, dtype=torch.bfloat16), random(9, 100, dtype=torch.bfloat16, seed=1)
    ids = torch.tensor([2, 0, 2, 1, 1, 0, 2, 2, 0])
    y = native.grouped_linear(wide[:, 3:67], packed(w), ids, None, 20)
    for i, expert in enumerate(ids.tolist()):
        assert torch.equal(y[i : i + 1], native.linear(wide[i : i + 1, 3:67], packed(w[expert]), None, 20))


@pytest.mark.parametrize("bad", [-1, 3])
def test_an_unknown_expert_is_refused(native: NativeKernels, bad: int) -> None:
    x, w = random(2, 16, dtype=torch.float32), packed(random(3, 16, 16, dtype=torch.float32))
    with pytest.raises(InternalError, match="index out of range"):
        native.grouped_linear(x, w, torch.tensor([0, bad]), None, 16)
    with pytest.raises(IndexError, match="expert ids"):
        torch.ops.llmc.grouped_linear(x, w, torch.tensor([0, bad]), None, 16)
