"""Weights -> GPU memory, through a few pinned buffers: while one is copied, the next is read and hashed.

What is hashed is the pinned copy that goes to the GPU, not the file, so nobody can change it in between. Nothing is returned before
the last chunk is verified and copied.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from llmc.artifacts.chunks import CHUNK_BYTES
from llmc.artifacts.manifest import TensorRecord
from llmc.artifacts.plan_check import REGION_ALIGNMENT
from llmc.artifacts.weight_source import WeightSource
from llmc.errors import ArtifactError
from llmc.runtime.cuda.device import Device, Stream
from llmc.runtime.memory import round_up
from llmc.runtime.weights import Weights


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceTensor:
    """A tensor in GPU memory, contiguous, at a multiple of REGION_ALIGNMENT."""

    address: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of a buffer and where they go."""

    start: int
    nbytes: int
    address: int


@dataclass(frozen=True, slots=True)
class _Lane:
    """A pinned buffer; `event` marks the end of the copies made from it last."""

    buffer: np.ndarray
    stream: Stream
    event: int


class _Lanes:
    """Buffers in turn, for any number of threads."""

    def __init__(self, device: Device, *, count: int, nbytes: int) -> None:
        self._device = device
        self._free: SimpleQueue[_Lane] = SimpleQueue()
        self._all: list[_Lane] = []
        for _ in range(count):
            lane = _Lane(device.pinned(nbytes, what="buffers for loading weights"), device.stream(), device.event())
            self._all.append(lane)
            self._free.put(lane)

    def send(self, nbytes: int, fill: Callable[[np.ndarray], None], pieces: Sequence[_Piece]) -> None:
        """Fill a free buffer's first `nbytes` and start copying pieces of it."""
        self._device.enter()
        lane = self._free.get()
        try:
            self._device.driver.call("cuEventSynchronize", lane.event)
            fill(lane.buffer[:nbytes])
            for piece in pieces:
                self._device.copy_in(piece.address, lane.buffer.ctypes.data + piece.start, piece.nbytes, lane.stream)
            self._device.driver.call("cuEventRecord", lane.event, lane.stream.handle)
        finally:
            self._free.put(lane)

    def close(self) -> None:
        """Wait for all copies, then give the buffers back."""
        try:
            for lane in self._all:
                self._device.synchronize(lane.stream)
        finally:
            for lane in self._all:
                self._device.release("cuEventDestroy_v2", lane.event)
                self._device.free_pinned(lane.buffer)
                self._device.free_stream(lane.stream)


class WeightLoading:
    """Every tensor on its way to the GPU, into one allocation, beside whatever else is done meanwhile.

    Args:
        sources: the artifact's weight files; each knows whether its chunks are to be hashed.
        tensors: all of the manifest's.
        bound: tensors without a file, from a checkpoint, in the host's memory.
        num_threads: readers, at least 1. timed: runs the whole, as a stage of the start.

    Attributes:
        placed: tensor name -> its place; what is there is known after `wait`.

    Raises:
        ArtifactError: a tensor has no source.
        ConfigError: the GPU's memory does not hold them.
    """

    def __init__(
        self,
        device: Device,
        sources: Sequence[WeightSource],
        tensors: Sequence[TensorRecord],
        bound: Weights | None,
        *,
        num_threads: int,
        timed: Callable[[Callable[[], None]], None] = lambda work: work(),
    ) -> None:
        places: dict[str, int] = {}
        total = 0
        for record in tensors:
            places[record.name] = total
            total = round_up(total + record.nbytes, REGION_ALIGNMENT)
        base = device.allocate(total, what="the weights")
        self.placed = {record.name: DeviceTensor(address=base + places[record.name], nbytes=record.nbytes) for record in tensors}
        self._sources = sources
        self._jobs = _file_jobs(sources, tensors, self.placed) + _bound_jobs(tensors, bound, self.placed)
        size = max((nbytes for nbytes, _, _ in self._jobs), default=0)
        self._lanes = _Lanes(device, count=num_threads + 1, nbytes=size) if self._jobs else None
        self._readers = ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="llmc-weights")
        self._whole = ThreadPoolExecutor(1, thread_name_prefix="llmc-weights-all")
        self._device = device
        self._loaded = self._whole.submit(timed, self._load)

    def wait(self) -> None:
        """Wait until everything is there.

        Raises:
            ArtifactError: a file is short, or a chunk's hash differs.
        """
        self._loaded.result()
        self._whole.shutdown()

    def stop(self) -> None:
        """Wait for what was begun, after which the device may be closed. A failure is told by `wait`."""
        self._readers.shutdown(cancel_futures=True)
        self._whole.shutdown()

    def _load(self) -> None:
        self._device.enter()
        lanes = self._lanes
        try:
            for _ in self._readers.map(lambda job: lanes.send(*job) if lanes else None, self._jobs):
                pass  # reading the results raises what a thread raised
        finally:
            self._readers.shutdown(cancel_futures=True)
            if lanes is not None:
                lanes.close()
        for source in self._sources:
            source.finish()


def load_weights(
    device: Device, sources: Sequence[WeightSource], tensors: Sequence[TensorRecord], bound: Weights | None, *, num_threads: int
) -> dict[str, DeviceTensor]:
    """Bring every tensor to the GPU and wait for it; see `WeightLoading`.

    Returns:
        Tensor name -> its place.

    Raises:
        ArtifactError, ConfigError: as `WeightLoading` and its `wait` say.
    """
    loading = WeightLoading(device, sources, tensors, bound, num_threads=num_threads)
    loading.wait()
    return loading.placed


_Job = tuple[int, Callable[[np.ndarray], None], list[_Piece]]


def _file_jobs(sources: Sequence[WeightSource], tensors: Sequence[TensorRecord], placed: dict[str, DeviceTensor]) -> list[_Job]:
    """One job per chunk of a file, with the tensors that lie in it."""
    jobs: list[_Job] = []
    by_file: dict[str, list[TensorRecord]] = {source.path: [] for source in sources}
    for record in tensors:
        if record.file is not None:
            if record.file not in by_file:
                raise ArtifactError(
                    f"tensor {record.name}: its file {record.file!r} is not among the artifact's weight files; compile again"
                )
            by_file[record.file].append(record)
    for source in sources:
        inside = sorted((r for r in by_file[source.path] if r.nbytes), key=lambda r: r.offset)
        ends = [r.offset + r.nbytes for r in inside]
        for index in range(source.num_chunks):
            start, nbytes = source.chunk_span(index)
            pieces = []
            for record in inside[bisect_left(ends, start + 1) :]:
                if record.offset >= start + nbytes:
                    break
                low, high = (max(record.offset, start), min(record.offset + record.nbytes, start + nbytes))
                pieces.append(_Piece(low - start, high - low, placed[record.name].address + low - record.offset))
            jobs.append((nbytes, lambda buffer, s=source, i=index: s.read_chunk(i, buffer.data), pieces))  # type: ignore[misc]
    return jobs


def _bound_jobs(tensors: Sequence[TensorRecord], bound: Weights | None, placed: dict[str, DeviceTensor]) -> list[_Job]:
    """One job per piece of CHUNK_BYTES of a tensor in the host's memory."""
    jobs: list[_Job] = []
    for record in tensors:
        if record.file is not None:
            continue
        if bound is None or record.name not in bound.views:
            raise ArtifactError(f"tensor {record.name}: lies in no file and no checkpoint has it; compile again")
        raw = bound.views[record.name].array.reshape(-1).view(np.uint8)
        for start in range(0, record.nbytes, CHUNK_BYTES):
            part = raw[start : start + CHUNK_BYTES]
            piece = _Piece(0, len(part), placed[record.name].address + start)
            jobs.append((len(part), lambda buffer, p=part: np.copyto(buffer, p), [piece]))  # type: ignore[misc]
    return jobs
