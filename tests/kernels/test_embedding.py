"""embedding: rows of a packed matrix come out bit for bit."""

from __future__ import annotations

import pytest
import torch

from llmc.errors import InternalError
from llmc.kernels import ops  # noqa: F401  (registers the ops)
from llmc.kernels.native import NativeKernels

from .matmul_world import DTYPES, native_fixture, packed, random

native = native_fixture()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (37, 45), (64, 32), (50, 130)])
def test_rows_come_out_exactly(native: NativeKernels, rows: int, k: int, dtype: torch.dtype) -> None:
    w = random(rows, k, dtype=dtype)
    for shape in ((0,), (1,), (5,), (2, 9)):
        ids = torch.randint(0, rows, shape)
        assert torch.equal(native.embedding(ids, packed(w), k), w[ids])
        assert torch.equal(torch.ops.llmc.embedding(ids, packed(w), k), w[ids])


def test_threads_do_not_change_rows(native: NativeKernels) -> None:
    w = random(300, 256, dtype=torch.bfloat16)
    ids = torch.randint(0, 300, (100,))
    native.num_threads = 2
    try:
        assert torch.equal(native.embedding(ids, packed(w), 256), w[ids])
    finally:
        native.num_threads = 1


@pytest.mark.parametrize("bad", [-1, 48])
def test_an_id_outside_the_matrix_is_refused(native: NativeKernels, bad: int) -> None:
    w = packed(random(37, 16, dtype=torch.float32))  # 37 rows, padded to 48
    with pytest.raises(InternalError, match="index out of range"):
        native.embedding(torch.tensor([0, bad]), w, 16)
    with pytest.raises(IndexError, match="48 rows"):
        torch.ops.llmc.embedding(torch.tensor([0, bad]), w, 16)
