"""Weight files -> one region of huge pages, hashed while they are read; or first mapped, hashed, and moved there later (weight_mover.py).

Reading and hashing release the interpreter lock, so a few threads overlap them; what is hashed is the copy that is used, not the
file, so nobody can change it in between. Nothing is returned before the last chunk is verified.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from llmc.artifacts.dtypes import NUMPY
from llmc.artifacts.element_sizes import nbytes_of
from llmc.artifacts.manifest import TensorRecord
from llmc.artifacts.weight_source import WeightSource
from llmc.errors import ArtifactError
from llmc.runtime.lane_hash import LaneHash
from llmc.runtime.memory import HUGE_PAGE_BYTES, TENSOR_ALIGN_BYTES, allocate_huge, round_up
from llmc.runtime.weight_mover import WeightMover, map_over, populate

_FEWEST_LANES = 6  # of LaneHash; hashlib has done fewer chunks sooner
_Task = TypeVar("_Task")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightView:
    """One tensor in memory. `array` keeps that memory alive; bfloat16 is carried as uint16."""

    dtype: str
    array: np.ndarray

    @property
    def address(self) -> int:
        return int(self.array.ctypes.data)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Every tensor of the artifact by name, and what loading them took."""

    views: Mapping[str, WeightView]
    num_bytes: int
    num_bytes_hashed: int
    stage_ms: Mapping[str, float]  # wall-clock milliseconds: "reserve", "fill" (read and hash, or bind)
    mover: WeightMover | None = None  # not started; None: they lie where they stay


def load_weights(sources: list[WeightSource], tensors: list[TensorRecord], *, num_threads: int, map_files: bool = False) -> Weights:
    """Bring packed weights into memory.

    Args:
        sources: the artifact's weight files; each knows whether its chunks are to be hashed.
        tensors: the records that lie in those files.
        num_threads: readers, at least 1; two saturate one disk, and hashing profits from more.
        map_files: map the files privately instead of copying them into huge pages. Takes the page cache's memory instead of new
            memory, and reads slower at every step.

    Raises:
        ArtifactError: a file is short, a chunk's hash differs, or a tensor lies outside its file.
    """
    began = time.perf_counter()
    regions = {source.path: _mapped(source) for source in sources} if map_files else _reserve(sources)
    reserved = time.perf_counter()
    _fill(sources, regions, copy=not map_files, num_threads=num_threads)
    views = {record.name: _view(record, regions) for record in tensors}
    return Weights(
        views=views,
        num_bytes=sum(source.size_bytes for source in sources),
        num_bytes_hashed=sum(source.size_bytes for source in sources if source.must_verify),
        stage_ms={"reserve": 1e3 * (reserved - began), "fill": 1e3 * (time.perf_counter() - reserved)},
    )


def map_weights(
    sources: list[WeightSource], tensors: list[TensorRecord], *, num_threads: int, lane_hash: Callable[[], LaneHash | None] = lambda: None
) -> Weights:
    """Packed weights where the page cache has them, verified, with what moves them into huge pages later.

    Args:
        sources: files of which `can_move` says yes.
        tensors, num_threads: as of `load_weights`.
        lane_hash: what hashes several chunks at once, called when there are chunks to hash; None: hashlib, one at a time.

    Raises:
        ArtifactError: as of `load_weights`. ConfigError: the system maps no files.
    """
    began = time.perf_counter()
    regions = _reserve(sources)
    for source in sources:
        map_over(source, regions[source.path])
    reserved = time.perf_counter()
    _verify_mapped(sources, regions, lane_hash, num_threads=num_threads)
    return Weights(
        views={record.name: _view(record, regions) for record in tensors},
        num_bytes=sum(source.size_bytes for source in sources),
        num_bytes_hashed=sum(source.size_bytes for source in sources if source.must_verify),
        stage_ms={"reserve": 1e3 * (reserved - began), "fill": 1e3 * (time.perf_counter() - reserved)},
        mover=WeightMover(sources, [regions[source.path] for source in sources]),
    )


def place_weights(tensors: list[TensorRecord], fill: Callable[[TensorRecord, np.ndarray], None], *, num_threads: int) -> Weights:
    """Weights that do not come from the artifact: reserve the same kind of region and let `fill` write each tensor.

    Args:
        fill: writes a record's packed tensor into the array given, of the record's dtype (bfloat16 as uint16) and shape; called from
            several threads, for different records.
    """
    began = time.perf_counter()
    offsets: list[int] = []
    total = 0
    for record in tensors:
        offsets.append(total)
        total = round_up(total + record.nbytes, TENSOR_ALIGN_BYTES)
    region = allocate_huge(total, what="the weights")
    views = {record.name: _typed(record, region[at : at + record.nbytes]) for at, record in zip(offsets, tensors, strict=True)}
    reserved = time.perf_counter()
    with ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="llmc-weights") as pool:
        for _ in pool.map(fill, tensors, [views[record.name].array for record in tensors]):
            pass  # fill writes in place; reading the results raises what it raised
    return Weights(
        views=views,
        num_bytes=total,
        num_bytes_hashed=0,
        stage_ms={"reserve": 1e3 * (reserved - began), "fill": 1e3 * (time.perf_counter() - reserved)},
    )


def merge_weights(first: Weights, second: Weights) -> Weights:
    """Two sets of differently named tensors as one."""
    return Weights(
        views={**first.views, **second.views},
        num_bytes=first.num_bytes + second.num_bytes,
        num_bytes_hashed=first.num_bytes_hashed + second.num_bytes_hashed,
        stage_ms={name: first.stage_ms[name] + second.stage_ms[name] for name in first.stage_ms},
    )


def _reserve(sources: list[WeightSource]) -> dict[str, np.ndarray]:
    """One huge-page region cut into a piece per file."""
    starts: list[int] = []
    total = 0
    for source in sources:
        starts.append(total)
        total = round_up(total + source.size_bytes, HUGE_PAGE_BYTES)
    region = allocate_huge(total, what="the weights")
    return {source.path: region[start : start + source.size_bytes] for start, source in zip(starts, sources, strict=True)}


def _mapped(source: WeightSource) -> np.ndarray:
    # ACCESS_COPY: private and writable, as kernels take plain pointers; no write could reach the file
    return np.frombuffer(mmap.mmap(source.fd, source.size_bytes, access=mmap.ACCESS_COPY), dtype=np.uint8)


def _fill(sources: list[WeightSource], regions: dict[str, np.ndarray], *, copy: bool, num_threads: int) -> None:
    """Read and verify chunk by chunk, over threads."""

    def one(task: tuple[WeightSource, int]) -> None:
        source, index = task
        start, nbytes = source.chunk_span(index)
        chunk = regions[source.path][start : start + nbytes].data
        if copy:
            source.read_chunk(index, chunk)
        elif source.must_verify:
            populate(regions[source.path][start : start + nbytes])
            source.verify_chunk(index, chunk)

    _in_threads(one, [(source, index) for source in sources for index in range(source.num_chunks)], num_threads)
    for source in sources:
        source.finish()


def _verify_mapped(
    sources: list[WeightSource], regions: dict[str, np.ndarray], lane_hash: Callable[[], LaneHash | None], *, num_threads: int
) -> None:
    """Verify mapped files, over threads, as many chunks at once as there are lanes."""

    def one(group: Sequence[tuple[WeightSource, int]]) -> None:
        chunks = []
        for source, index in group:
            start, nbytes = source.chunk_span(index)
            chunks.append(regions[source.path][start : start + nbytes])
            populate(chunks[-1])
        lanes = lane_hash() if len(group) >= _FEWEST_LANES else None
        digests = lanes(chunks) if lanes is not None else [None] * len(group)
        for (source, index), chunk, digest in zip(group, chunks, digests, strict=True):
            if digest is None:
                source.verify_chunk(index, chunk.data)
            else:
                source.accept_chunk(index, digest, chunk.data)

    tasks = [(source, index) for source in sources if source.must_verify for index in range(source.num_chunks)]
    _in_threads(one, _groups(tasks), num_threads)
    for source in sources:
        source.finish()


def _groups(tasks: Sequence[tuple[WeightSource, int]]) -> list[list[tuple[WeightSource, int]]]:
    """Chunks of one length, as many as there are lanes; the rest, too few for that, one by one."""
    by_length: dict[int, list[tuple[WeightSource, int]]] = {}
    for source, index in tasks:
        by_length.setdefault(source.chunk_span(index)[1], []).append((source, index))
    groups = []
    for same in by_length.values():
        groups += [same[at : at + LaneHash.LANES] for at in range(0, len(same), LaneHash.LANES)]
    return [part for group in groups for part in ([group] if len(group) >= _FEWEST_LANES else [[task] for task in group])]


def _in_threads(work: Callable[[_Task], None], tasks: Sequence[_Task], num_threads: int) -> None:
    with ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="llmc-weights") as pool:
        for _ in pool.map(work, tasks):
            pass  # reading the results raises what a thread raised


def _view(record: TensorRecord, regions: dict[str, np.ndarray]) -> WeightView:
    region = regions.get(record.file or "")
    if region is None:
        raise ArtifactError(f"tensor {record.name}: its file {record.file!r} is not among the artifact's weight files; compile again")
    if record.offset < 0 or record.offset + record.nbytes > len(region):
        raise ArtifactError(f"tensor {record.name}: bytes {record.offset} to {record.offset + record.nbytes} lie outside {record.file}")
    return _typed(record, region[record.offset : record.offset + record.nbytes])


def _typed(record: TensorRecord, piece: np.ndarray) -> WeightView:
    """Raw bytes as the record's dtype and shape; the last check before an address goes to machine code."""
    dtype = NUMPY[record.dtype]
    if nbytes_of(record.dtype, record.shape) != record.nbytes:
        raise ArtifactError(f"tensor {record.name}: {record.dtype} {record.shape} does not take {record.nbytes} bytes; compile again")
    if piece.ctypes.data % dtype.itemsize:
        raise ArtifactError(f"tensor {record.name}: lies at an offset not aligned to {record.dtype}; compile again")
    return WeightView(dtype=record.dtype, array=piece.view(dtype).reshape(record.shape))
