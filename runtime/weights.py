"""Weight files -> one region of memory, hashed while they are read.

Reading and hashing release the interpreter lock, so a few threads overlap them; what was hashed is the copy that is used, not the
file, so nobody can change it in between. Nothing is returned before the last chunk is verified.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from llmc.artifacts.manifest import TensorRecord, WeightFile
from llmc.errors import ArtifactError
from llmc.runtime.memory import HUGE_PAGE_BYTES, NUMPY_DTYPES, TENSOR_ALIGN_BYTES, allocate_huge, round_up


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightView:
    """One tensor in memory. `array` keeps that memory alive; bfloat16 is carried as uint16."""

    dtype: str
    array: np.ndarray

    @property
    def address(self) -> int:
        return self.array.ctypes.data

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Every tensor of the artifact by name, and what loading them took."""

    views: Mapping[str, WeightView]
    num_bytes: int
    num_bytes_hashed: int
    stage_ms: Mapping[str, float]  # "allocate", "read", "hash" (the last two summed over threads), "wall"


def load_weights(
    files: list[tuple[WeightFile, int]], tensors: list[TensorRecord], *, verify: bool, num_threads: int, map_files: bool = False
) -> Weights:
    """Bring the packed weights into memory.

    Args:
        files: each weight file's record and an open descriptor of it; descriptors stay open and are not moved.
        tensors: the records that lie in `files`.
        verify: hash every chunk against its record.
        num_threads: readers; at least 1.
        map_files: map the files privately instead of copying them into huge pages. Starts faster when `verify` is off, uses the page
            cache's memory, and reads slower at every step.

    Raises:
        ArtifactError: a file is short, a chunk's hash differs, or a tensor lies outside its file.
    """
    began = time.perf_counter()
    regions = _map(files) if map_files else _reserve(files)
    allocated = time.perf_counter()
    read_s, hash_s = _fill(files, regions, copy=not map_files, verify=verify, num_threads=num_threads)
    views = {record.name: _view(record, regions) for record in tensors}
    num_bytes = sum(record.size_bytes for record, _ in files)
    stage_ms = {
        "allocate": 1e3 * (allocated - began),
        "read": 1e3 * read_s,
        "hash": 1e3 * hash_s,
        "wall": 1e3 * (time.perf_counter() - began),
    }
    return Weights(views=views, num_bytes=num_bytes, num_bytes_hashed=num_bytes if verify else 0, stage_ms=stage_ms)


def place_weights(tensors: list[TensorRecord], fill: Callable[[TensorRecord, np.ndarray], None], *, num_threads: int) -> Weights:
    """Weights that do not come from the artifact: reserve the same region and let `fill` write each tensor.

    Args:
        fill: writes the packed bytes of a record into the uint8 array given; called from several threads, for different records.
    """
    began = time.perf_counter()
    offsets: list[int] = []
    total = 0
    for record in tensors:
        offsets.append(total)
        total = round_up(total + record.nbytes, TENSOR_ALIGN_BYTES)
    region = allocate_huge(total, what="the weights")
    allocated = time.perf_counter()
    places = [region[offset : offset + record.nbytes] for offset, record in zip(offsets, tensors, strict=True)]
    with ThreadPoolExecutor(num_threads, thread_name_prefix="llmc-weights") as pool:
        list(pool.map(fill, tensors, places))
    views = {record.name: _typed(record, place) for record, place in zip(tensors, places, strict=True)}
    stage_ms = {"allocate": 1e3 * (allocated - began), "wall": 1e3 * (time.perf_counter() - began)}
    return Weights(views=views, num_bytes=total, num_bytes_hashed=0, stage_ms=stage_ms)


def _reserve(files: list[tuple[WeightFile, int]]) -> dict[str, np.ndarray]:
    """One huge-page region cut into a piece per file."""
    starts: list[int] = []
    total = 0
    for record, _ in files:
        starts.append(total)
        total = round_up(total + record.size_bytes, HUGE_PAGE_BYTES)
    region = allocate_huge(total, what="the weights")
    return {record.path: region[start : start + record.size_bytes] for start, (record, _) in zip(starts, files, strict=True)}


def _map(files: list[tuple[WeightFile, int]]) -> dict[str, np.ndarray]:
    regions = {}
    for record, fd in files:
        size_bytes = os.fstat(fd).st_size
        if size_bytes != record.size_bytes:
            raise ArtifactError(f"{record.path}: {size_bytes} bytes where the manifest says {record.size_bytes}; copy the artifact again")
        # ACCESS_COPY: private, so that no write through a kernel could reach the file
        regions[record.path] = np.frombuffer(mmap.mmap(fd, record.size_bytes, access=mmap.ACCESS_COPY), dtype=np.uint8)
    return regions


def _fill(
    files: list[tuple[WeightFile, int]], regions: dict[str, np.ndarray], *, copy: bool, verify: bool, num_threads: int
) -> tuple[float, float]:
    """Read and check chunk by chunk, largest spread over threads. Returns seconds spent reading and hashing, over all threads."""
    if not copy and not verify:
        return 0.0, 0.0

    def one(task: tuple[WeightFile, int, int]) -> tuple[float, float]:
        record, fd, index = task
        start = index * record.chunk_bytes
        chunk = memoryview(regions[record.path])[start : start + record.chunk_bytes]
        began = time.perf_counter()
        if copy:
            _read_exactly(fd, chunk, start, record.path)
        read = time.perf_counter()
        if verify:
            found = hashlib.sha256(chunk).hexdigest()
            if found != record.chunks[index]:
                raise ArtifactError(
                    f"{record.path}: bytes {start} to {start + len(chunk)} have sha256 {found}, the manifest says {record.chunks[index]}; "
                    "the file is damaged, copy or compile the artifact again"
                )
        return read - began, time.perf_counter() - read

    tasks = [(record, fd, index) for record, fd in files for index in range(math.ceil(record.size_bytes / record.chunk_bytes))]
    for record, _ in files:
        if len(record.chunks) != math.ceil(record.size_bytes / record.chunk_bytes):
            raise ArtifactError(f"{record.path}: {len(record.chunks)} chunk hashes do not tile {record.size_bytes} bytes; compile again")
    with ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="llmc-weights") as pool:
        spent = list(pool.map(one, tasks))
    return sum(read for read, _ in spent), sum(hashed for _, hashed in spent)


def _read_exactly(fd: int, into: memoryview, offset: int, path: str) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(fd, [into[done:]], offset + done)
        if count == 0:
            raise ArtifactError(f"{path}: ends at byte {offset + done}, {len(into) - done} bytes early; copy the artifact again")
        done += count


def _view(record: TensorRecord, regions: dict[str, np.ndarray]) -> WeightView:
    region = regions.get(record.file or "")
    if region is None:
        raise ArtifactError(f"tensor {record.name}: its file {record.file!r} is not among the artifact's weight files; compile again")
    if record.offset < 0 or record.offset + record.nbytes > len(region):
        raise ArtifactError(f"tensor {record.name}: bytes {record.offset} to {record.offset + record.nbytes} lie outside {record.file}")
    return _typed(record, region[record.offset : record.offset + record.nbytes])


def _typed(record: TensorRecord, piece: np.ndarray) -> WeightView:
    dtype = NUMPY_DTYPES[record.dtype]
    if math.prod(record.shape) * dtype.itemsize != record.nbytes:
        raise ArtifactError(f"tensor {record.name}: {record.dtype} {record.shape} does not take {record.nbytes} bytes; compile again")
    if piece.ctypes.data % dtype.itemsize:
        raise ArtifactError(f"tensor {record.name}: lies at an offset not aligned to {record.dtype}; compile again")
    return WeightView(dtype=record.dtype, array=piece.view(dtype).reshape(record.shape))
