"""The packed layout, element by element as docs/architecture.md words it."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.errors import ConfigError
from llmc.kernels.packing import pack, packed_shape, unpack


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 32), (17, 33), (50, 7)])
def test_every_element_has_its_place(n: int, k: int, dtype: type) -> None:
    w = (np.arange(n * k).reshape(n, k) + 1).astype(dtype)
    p = pack(w)
    assert p.shape == packed_shape(n, k, dtype) and p.dtype == dtype and p.flags.c_contiguous
    for row in range(n):
        for column in range(k):
            index = (row // 16, column, row % 16) if dtype == np.float32 else (row // 16, column // 2, row % 16, column % 2)
            assert p[index] == w[row, column]
    assert np.count_nonzero(p) == np.count_nonzero(w), "padding is zero"
    assert np.array_equal(unpack(p, n, k), w)


def test_refuses_other_dtypes_and_shapes() -> None:
    with pytest.raises(ConfigError, match="float64"):
        pack(np.zeros((2, 2)))
    with pytest.raises(ConfigError, match="packs to"):
        unpack(np.zeros((1, 4, 16), np.float32), 16, 5)
