"""Read the headers of safetensors files: which tensor lies where. No weight is read.

A header is data from outside, so everything it says is checked before it is believed: its size, its JSON, each
tensor's dtype, shape and byte range, and that the ranges tile the file without overlap or hole.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.errors import UnsupportedModel

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMS = 16

ITEM_BYTES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointTensor:
    """Where one tensor of the checkpoint lies."""

    name: str
    file: str  # relative to the model folder
    dtype: str  # as safetensors spells it, "BF16"
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int


def read_header(path: Path, file: str) -> dict[str, CheckpointTensor]:
    """Read and check one file's header.

    Args:
        path: the file.
        file: its name relative to the model folder, for the table and the messages.

    Returns:
        Tensor name -> where it lies, in the order of offsets.

    Raises:
        UnsupportedModel: the file is not a whole, well-formed safetensors file; says what is wrong with which tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as handle:
        prefix = handle.read(8)
        if len(prefix) < 8:
            raise UnsupportedModel(f"{path}: {size} bytes is too short for a safetensors file (8 for the header's length)")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise UnsupportedModel(f"{path}: header of {length} bytes does not fit ({size} bytes in the file, limit {MAX_HEADER_BYTES})")
        raw = handle.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path}: safetensors header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise UnsupportedModel(f"{path}: safetensors header is a {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    tensors = sorted((_tensor(path, file, 8 + length, name, entry) for name, entry in header.items()), key=lambda t: (t.offset, t.nbytes))
    _check_tiling(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands in it twice")
    return table


def _tensor(path: Path, file: str, start: int, name: str, entry: Any) -> CheckpointTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UnsupportedModel(f"{path}: tensor {name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in ITEM_BYTES:
        raise UnsupportedModel(f"{path}: tensor {name!r} has dtype {dtype!r}; llmc reads {', '.join(ITEM_BYTES)}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMS:
        raise UnsupportedModel(f"{path}: tensor {name!r} has shape {shape!r}; expected at most {MAX_DIMS} non-negative integers")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UnsupportedModel(f"{path}: tensor {name!r} has data_offsets {offsets!r}; expected [begin, end]")
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise UnsupportedModel(f"{path}: tensor {name!r} spans {offsets[1] - offsets[0]} bytes, its shape and dtype need {expected}")
    return CheckpointTensor(name=name, file=file, dtype=dtype, shape=tuple(shape), offset=start + offsets[0], nbytes=expected)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _check_tiling(path: Path, tensors: list[CheckpointTensor], start: int, size: int) -> None:
    position = start
    for tensor in tensors:
        if tensor.offset != position:
            kind = "overlaps the tensor before it" if tensor.offset < position else "leaves a hole before it"
            raise UnsupportedModel(f"{path}: tensor {tensor.name!r} {kind} (begins at byte {tensor.offset}, expected {position})")
        position += tensor.nbytes
    if position != size:
        raise UnsupportedModel(f"{path}: tensors end at byte {position}, the file at {size}; it is cut short or has data of unknown use")
