"""Weights in memory: right bytes, right alignment, and no view of bytes that were not verified."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from llmc.artifacts.stamps import StampFolder
from llmc.artifacts.verify import open_artifact
from llmc.errors import ArtifactError, ConfigError
from llmc.runtime.memory import HUGE_PAGE_BYTES, allocate_huge, available_bytes
from llmc.runtime.weights import load_weights, place_weights
from tests.runtime.toy_artifact import write_toy_artifact

WEIGHTS = {
    "big": np.random.default_rng(0).normal(size=(3, 1 << 21)).astype(np.float32),  # 24 MB: two chunks
    "embed": np.arange(32 * 16, dtype=np.float32).reshape(32, 16),
    "head": np.ones((32, 16), dtype=np.float32),
}


@pytest.fixture(scope="module")
def artifact_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    (folder / "program").write_bytes(b"\x7fELF")
    return write_toy_artifact(folder / "artifact", folder / "program", WEIGHTS)


@pytest.mark.parametrize("map_files", [False, True])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_views_hold_the_tensors(artifact_folder, map_files, num_threads):
    with open_artifact(artifact_folder) as artifact:
        weights = load_weights(artifact.weights(), artifact.manifest.tensors, num_threads=num_threads, map_files=map_files)
    assert set(weights.views) == set(WEIGHTS)
    for name, expected in WEIGHTS.items():
        view = weights.views[name]
        np.testing.assert_array_equal(view.array, expected)
        assert view.shape == expected.shape and view.address % 64 == 0
    assert weights.num_bytes_hashed == weights.num_bytes > WEIGHTS["big"].nbytes
    assert set(weights.stage_ms) == {"reserve", "fill"}


@pytest.mark.parametrize("map_files", [False, True])
@pytest.mark.parametrize("place", [0.1, 0.9])
def test_one_flipped_bit_is_found(artifact_folder, tmp_path, map_files, place):
    (path,) = (artifact_folder / "weights").iterdir()
    data = bytearray(path.read_bytes())
    at = int(len(data) * place)
    original = data[at]
    try:
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(bytes([original ^ 1]))
        with open_artifact(artifact_folder) as artifact:
            tensors = artifact.manifest.tensors
            with pytest.raises(ArtifactError, match=r"weights/.*: bytes \d+ to \d+ are damaged"):
                load_weights(artifact.weights(), tensors, num_threads=2, map_files=map_files)
            unchecked = load_weights(artifact.weights(verify="never"), tensors, num_threads=2, map_files=map_files)
            assert unchecked.num_bytes_hashed == 0
    finally:
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(bytes([original]))


def test_a_file_that_shrinks_while_open_is_an_error(artifact_folder, tmp_path):
    copy = tmp_path / "artifact"
    write_toy_artifact(copy, _program(tmp_path), WEIGHTS)
    with open_artifact(copy) as artifact:
        sources = artifact.weights()
        os.truncate(copy / "weights" / "model.safetensors", 1 << 20)
        with pytest.raises(ArtifactError, match="ends at byte 1048576"):
            load_weights(sources, artifact.manifest.tensors, num_threads=2)


def test_verified_once(artifact_folder, tmp_path):
    stamps = StampFolder(tmp_path / "stamps")
    with open_artifact(artifact_folder) as artifact:
        tensors = artifact.manifest.tensors
        first = load_weights(artifact.weights(verify="once", stamps=stamps), tensors, num_threads=2)
        second = load_weights(artifact.weights(verify="once", stamps=stamps), tensors, num_threads=2)
    assert first.num_bytes_hashed > 0 and second.num_bytes_hashed == 0
    np.testing.assert_array_equal(second.views["embed"].array, WEIGHTS["embed"])


def test_a_tensor_outside_its_file_is_refused(artifact_folder):
    import msgspec

    with open_artifact(artifact_folder) as artifact:
        (record,) = [tensor for tensor in artifact.manifest.tensors if tensor.name == "head"]
        for changes, message in (
            ({"offset": record.offset + (1 << 30)}, "lie outside"),
            ({"nbytes": record.nbytes - 4}, "does not take"),
            ({"file": "weights/other"}, "not among"),
            ({"offset": record.offset - 2}, "not aligned"),
        ):
            with pytest.raises(ArtifactError, match=message):
                load_weights(artifact.weights(), [msgspec.structs.replace(record, **changes)], num_threads=1)


def test_placing_what_does_not_come_from_the_artifact(artifact_folder):
    seen = set()

    def fill(record, into):
        seen.add((record.name, threading.current_thread().name.startswith("llmc-weights")))
        into[...] = WEIGHTS[record.name]

    with open_artifact(artifact_folder) as artifact:
        weights = place_weights(artifact.manifest.tensors, fill, num_threads=2)
    assert seen == {(name, True) for name in WEIGHTS}
    assert all(np.array_equal(weights.views[name].array, WEIGHTS[name]) for name in WEIGHTS)

    def failing(record, into):
        raise ArtifactError("no such tensor in the checkpoint")

    with open_artifact(artifact_folder) as artifact, pytest.raises(ArtifactError, match="no such tensor"):
        place_weights(artifact.manifest.tensors, failing, num_threads=2)


def test_huge_regions():
    region = allocate_huge(5 << 20, what="a test")
    assert region.ctypes.data % HUGE_PAGE_BYTES == 0 and len(region) == 5 << 20 and not region.any()
    with pytest.raises(ConfigError, match="a test needs"):
        allocate_huge(1 << 62, what="a test")
    assert available_bytes() > 0


def _program(folder: Path) -> Path:
    (folder / "program").write_bytes(b"\x7fELF")
    return folder / "program"
