"""The kernels image's SHA-256 of several buffers at once, against hashlib's."""

from __future__ import annotations

import ctypes
import hashlib

import numpy as np
import pytest

from llmc.errors import InternalError
from llmc.kernels.build import build_kernels
from llmc.runtime.lane_hash import LaneHash
from tests.kernels.matmul_world import kernel_cache, runnable_levels


def image(level: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return ctypes.CDLL(str(build_kernels(level, kernel_cache(tmp_path_factory)).kernels_so))


@pytest.fixture(scope="module")
def lanes(tmp_path_factory: pytest.TempPathFactory) -> LaneHash:
    level = runnable_levels()[-1].name
    if level == "x86-64-v3":
        pytest.skip("this processor has no AVX-512")
    found = LaneHash.of(image(level, tmp_path_factory))
    assert found is not None
    return found


def test_a_level_without_the_instructions_leaves_it_to_hashlib(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert LaneHash.of(image("x86-64-v3", tmp_path_factory)) is None


@pytest.mark.parametrize("count", [1, 7, 16])
def test_digests_are_those_of_hashlib(lanes: LaneHash, count: int) -> None:
    rng = np.random.default_rng(count)
    for length in (0, 1, 3, 55, 56, 57, 63, 64, 65, 119, 120, 127, 128, 129, 4096, 1_000_003):  # around a block's end and its padding's
        buffers = [rng.integers(0, 256, length, dtype=np.uint8) for _ in range(count)]
        assert lanes(buffers) == [hashlib.sha256(buffer).hexdigest() for buffer in buffers], length


def test_a_known_digest(lanes: LaneHash) -> None:
    # FIPS 180-2, appendix B.1
    assert lanes([np.frombuffer(b"abc", dtype=np.uint8)]) == ["ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"]


def test_more_buffers_than_lanes_are_refused(lanes: LaneHash) -> None:
    with pytest.raises(InternalError, match="hashing 17 buffers failed with status 3"):
        lanes([np.zeros(64, dtype=np.uint8)] * 17)


def test_an_image_without_it_is_told_apart() -> None:
    assert LaneHash.of(ctypes.CDLL(None)) is None
