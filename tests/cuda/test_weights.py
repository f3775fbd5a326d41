"""Weights to the GPU in chunks: every byte arrives, whatever the chunks cut through, and a damaged chunk is told."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmc.artifacts.chunks import ChunkHasher
from llmc.artifacts.manifest import TensorRecord, WeightFile
from llmc.artifacts.weight_source import WeightSource
from llmc.errors import ArtifactError, InternalError
from llmc.runtime.cuda.device import Device
from llmc.runtime.cuda.driver import Driver
from llmc.runtime.cuda.weights import DeviceTensor, load_weights
from llmc.runtime.weights import Weights, WeightView
from tests.cuda.stand_in import StandIn

CHUNK = 4096
# name -> (offset, bytes); the last lies in no file
PLACES = {"a": (128, 100), "empty": (256, 0), "b": (256, 10_000), "c": (10_304, 1_900), "d": (12_288, 4096), "e": (16_384, 64)}


@pytest.fixture
def device(stand_in: Callable[..., StandIn], monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr("llmc.runtime.cuda.driver.LIBRARY", str(stand_in(memory=1 << 26).path))
    return Device(Driver())


def file_of(folder: Path, data: bytes) -> WeightFile:
    (folder / "w.safetensors").write_bytes(data)
    hasher = ChunkHasher(CHUNK)
    hasher.update(data)
    return WeightFile(path="weights/w.safetensors", size_bytes=len(data), chunk_bytes=CHUNK, chunks=hasher.chunks())


def source_of(folder: Path, record: WeightFile) -> WeightSource:
    return WeightSource(record, os.open(folder / "w.safetensors", os.O_RDONLY), "out/weights/w.safetensors", "always", None)


def records(path: str) -> list[TensorRecord]:
    return [
        TensorRecord(name=name, dtype="uint8", shape=[nbytes], file=path, offset=offset, nbytes=nbytes, recipe={})
        for name, (offset, nbytes) in PLACES.items()
    ]


def read(device: Device, tensor: DeviceTensor) -> bytes:
    stream, buffer = device.stream(), device.pinned(max(tensor.nbytes, 1), what="a test")
    device.copy_out(buffer.ctypes.data, tensor.address, tensor.nbytes, stream)
    device.synchronize(stream)
    return buffer[: tensor.nbytes].tobytes()


@pytest.mark.parametrize("threads", [1, 3])
def test_every_byte_arrives(device: Device, tmp_path: Path, threads: int) -> None:
    data = np.random.default_rng(threads).integers(0, 256, 16_500, dtype=np.uint8).tobytes()
    weight = file_of(tmp_path, data)
    other = np.random.default_rng(5).integers(0, 1 << 16, 300).astype(np.uint16)
    outside = TensorRecord(name="f", dtype="bfloat16", shape=[300], file=None, offset=0, nbytes=600, recipe={})
    bound = Weights(views={"f": WeightView(dtype="bfloat16", array=other)}, num_bytes=600, num_bytes_hashed=0, stage_ms={})
    placed = load_weights(device, [source_of(tmp_path, weight)], [*records(weight.path), outside], bound, num_threads=threads)
    for name, (offset, nbytes) in PLACES.items():
        assert placed[name].address % 256 == 0
        assert read(device, placed[name]) == data[offset : offset + nbytes]
    assert read(device, placed["f"]) == other.tobytes()
    device.close()


def test_a_damaged_chunk_and_a_tensor_without_a_source(device: Device, tmp_path: Path) -> None:
    data = bytearray(16_500)
    weight = file_of(tmp_path, bytes(data))
    data[9000] = 1
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match="bytes 8192 to 12288 are damaged"):
        load_weights(device, [source_of(tmp_path, weight)], records(weight.path), None, num_threads=2)
    with pytest.raises(ArtifactError, match="its file 'weights/other' is not among"):
        load_weights(device, [source_of(tmp_path, weight)], records("weights/other"), None, num_threads=2)
    outside = TensorRecord(name="f", dtype="bfloat16", shape=[300], file=None, offset=0, nbytes=600, recipe={})
    with pytest.raises(ArtifactError, match="tensor f: lies in no file and no checkpoint has it"):
        load_weights(device, [], [outside], None, num_threads=2)
    device.close()


def test_copies_stay_within_what_is_allocated(device: Device) -> None:
    stream, buffer = device.stream(), device.pinned(1024, what="a test")
    address = device.allocate(512, what="a test")
    with pytest.raises(InternalError, match="cuMemcpyHtoDAsync_v2 gave CUDA_ERROR_INVALID_VALUE"):
        device.copy_in(address, buffer.ctypes.data, 1024, stream)
    device.close()
