"""The largest of a row found in its bits is the one that argmax over float32 finds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llmc.errors import ArtifactError
from llmc.runtime.executors.logits import Logits, LogitsBuffer

# Few enough that rows have ties: zeros, ones, the smallest and largest numbers, infinities and NaNs, each with both signs.
PICKED = {
    "bfloat16": [0x0000, 0x0001, 0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x7F81, 0x7FFF],
    "float16": [0x0000, 0x0001, 0x3C00, 0x3C01, 0x7BFF, 0x7C00, 0x7C01, 0x7FFF],
}


def given_by_a_program(bits: np.ndarray, dtype: str) -> np.ndarray:
    return bits if dtype == "bfloat16" else bits.view(np.float16)


def largest_of_float32(wide: np.ndarray) -> list[int]:
    return [int(row.argmax()) if np.isfinite(row[row.argmax()]) else -1 for row in wide]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_largest_is_argmax_over_float32(dtype: str, data: st.DataObject) -> None:
    signs = data.draw(st.sampled_from([[0], [0x8000], [0, 0x8000]]))
    some = data.draw(st.lists(st.sampled_from(PICKED[dtype]), min_size=1, max_size=6))
    element = st.sampled_from([sign | bits for sign in signs for bits in some])
    bits = data.draw(arrays(np.uint16, (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 70))), elements=element, fill=st.nothing()))
    logits = Logits(given_by_a_program(bits, dtype), LogitsBuffer(dtype))
    found = logits.largest()
    assert found == largest_of_float32(logits.to_float32())
    assert Logits(logits.to_float32()).largest() == found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shift", [0.0, -40.0])
def test_every_row_of_a_vocabulary(dtype: str, shift: float) -> None:
    wide = (np.random.default_rng(0).normal(size=(9, 5003)) * 4 + shift).astype(np.float32)  # bfloat16 has ties among so many
    bits = (wide.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else wide.astype(np.float16).view(np.uint16)
    logits = Logits(given_by_a_program(bits, dtype), LogitsBuffer(dtype))
    assert logits.largest() == largest_of_float32(logits.to_float32())
    assert len(logits) == 9 and min(logits.largest()) >= 0
    if dtype == "bfloat16":
        np.testing.assert_array_equal(logits.to_float32().view(np.uint32) >> 16, bits)


def test_zeros_of_either_sign_are_equal() -> None:
    rows = np.array([[0xBF80, 0x8000, 0x0000], [0xBF80, 0x0000, 0x8000], [0x8000, 0x8000, 0xBF80]], dtype=np.uint16)
    assert Logits(rows, LogitsBuffer("bfloat16")).largest() == [1, 1, 0]


def test_rows_are_widened_once_and_may_be_changed() -> None:
    logits = Logits(np.full((2, 3), 0x3F80, dtype=np.uint16), LogitsBuffer("bfloat16"))
    logits.to_float32()[1] = 5.0
    np.testing.assert_array_equal(logits.to_float32(), [[1.0] * 3, [5.0] * 3])


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ArtifactError, match="logits of dtype int8; float32, float16 or bfloat16 is expected"):
        LogitsBuffer("int8")
