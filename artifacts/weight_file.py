"""Writing packed weights: one safetensors file, streamed, hashed per chunk on the way.

Data starts at a multiple of 4096 bytes and every tensor at a multiple of 64. The format allows no holes, so the gaps are
tensors of their own, uint8 zeros named "__padding__.<n>".
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.artifacts.chunks import CHUNK_BYTES, ChunkHasher
from llmc.artifacts.consistency import ALIGNMENT
from llmc.artifacts.dtypes import NUMPY, SAFETENSORS, Array
from llmc.artifacts.element_sizes import nbytes_of
from llmc.artifacts.filesystem import FileSystem, require_free_bytes, write_all
from llmc.artifacts.manifest import Dtype, TensorRecord, WeightFile
from llmc.errors import InternalError

PAGE_BYTES = 4096
PADDING_PREFIX = "__padding__."


@dataclass(frozen=True, kw_only=True)
class WeightTensor:
    """A tensor to be written. `blocks` is called once, when its turn comes, and gives its bytes in order."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    recipe: dict[str, Any]
    blocks: Callable[[], Iterable[Array]]  # C-contiguous arrays of the dtype (bf16 as uint16) that together fill the tensor


@dataclass(frozen=True)
class _Slot:
    tensor: WeightTensor
    offset: int  # from the start of the data
    padding: int  # zero bytes after it


def write_weight_file(
    fs: FileSystem, fd: int, folder: str, path: str, tensors: Sequence[WeightTensor]
) -> tuple[WeightFile, list[TensorRecord]]:
    """Stream tensors, in the order given, into an open empty file.

    Args:
        fs: file-system calls.
        fd: where to write.
        folder: the folder the file lies in, for asking about free space.
        path: the file's name inside the artifact.
        tensors: in the order the runtime touches them.

    Returns:
        The file's record with its chunk digests, and one record per tensor.

    Raises:
        OSError: the system could not write.
        InternalError: blocks do not add up to their tensor, or two tensors share a name.
    """
    slots = _lay_out(tensors)
    header = _header(slots)
    total = len(header) + (slots[-1].offset + nbytes_of(slots[-1].tensor.dtype, slots[-1].tensor.shape) + slots[-1].padding if slots else 0)
    require_free_bytes(folder, total)
    hasher = ChunkHasher(CHUNK_BYTES)

    def put(data: bytes | memoryview) -> None:
        hasher.update(data)
        write_all(fs, fd, data)

    put(header)
    records = []
    for slot in slots:
        _put_tensor(slot.tensor, put)
        put(bytes(slot.padding))
        records.append(
            TensorRecord(
                name=slot.tensor.name,
                dtype=slot.tensor.dtype,
                shape=list(slot.tensor.shape),
                file=path,
                offset=len(header) + slot.offset,
                nbytes=nbytes_of(slot.tensor.dtype, slot.tensor.shape),
                recipe=slot.tensor.recipe,
            )
        )
    if hasher.size_bytes != total:
        raise InternalError(f"{path}: wrote {hasher.size_bytes} bytes, the header promises {total}; please report this")
    return WeightFile(path=path, size_bytes=total, chunk_bytes=CHUNK_BYTES, chunks=hasher.chunks()), records


def _put_tensor(tensor: WeightTensor, put: Callable[[memoryview], None]) -> None:
    expected, written = nbytes_of(tensor.dtype, tensor.shape), 0
    for block in tensor.blocks():
        if block.dtype != NUMPY[tensor.dtype]:
            raise InternalError(f"tensor {tensor.name}: a block has dtype {block.dtype}, expected {NUMPY[tensor.dtype]} for {tensor.dtype}")
        written += block.nbytes
        if block.nbytes:
            put(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    if written != expected:
        raise InternalError(f"tensor {tensor.name}: its blocks have {written} bytes, {tensor.dtype} {list(tensor.shape)} needs {expected}")


def _lay_out(tensors: Sequence[WeightTensor]) -> list[_Slot]:
    names = [tensor.name for tensor in tensors]
    if len(set(names)) != len(names):
        raise InternalError(f"two tensors to be written share a name: {sorted(n for n in names if names.count(n) > 1)[0]}")
    slots, offset = [], 0
    for tensor in tensors:
        nbytes = nbytes_of(tensor.dtype, tensor.shape)
        padding = -nbytes % ALIGNMENT
        slots.append(_Slot(tensor, offset, padding))
        offset += nbytes + padding
    return slots


def _header(slots: list[_Slot]) -> bytes:
    """Length, JSON, and spaces up to a page boundary."""
    table: dict[str, object] = {"__metadata__": {"producer": "llmc"}}
    for number, slot in enumerate(slots):
        end = slot.offset + nbytes_of(slot.tensor.dtype, slot.tensor.shape)
        table[slot.tensor.name] = {
            "dtype": SAFETENSORS[slot.tensor.dtype],
            "shape": list(slot.tensor.shape),
            "data_offsets": [slot.offset, end],
        }
        if slot.padding:
            padding = {"dtype": "U8", "shape": [slot.padding], "data_offsets": [end, end + slot.padding]}
            table[f"{PADDING_PREFIX}{number}"] = padding
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % PAGE_BYTES)
    return len(text).to_bytes(8, "little") + text


def copy_into(fs: FileSystem, source_fd: int, fd: int, update: Callable[[bytes], None]) -> int:
    """Copy one open file into another, telling `update` every piece. Returns the number of bytes."""
    total = 0
    while piece := fs.read(source_fd, 1 << 20):
        update(piece)
        write_all(fs, fd, piece)
        total += len(piece)
    return total


def size_of(fd: int) -> int:
    return os.fstat(fd).st_size
