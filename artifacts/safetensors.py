"""Reading safetensors files: the header is checked whole before any of it is used, tensors are mapped one at a time.

A file is: 8 bytes little-endian header length, JSON {name: {dtype, shape, data_offsets}}, data. Offsets count from the start of
the data. Holes between tensors are allowed in what we read; overlaps, out-of-bounds offsets, wrong sizes and duplicate names are not.
"""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from llmc.artifacts.dtypes import FROM_SAFETENSORS, NUMPY, Array
from llmc.errors import ArtifactError

MAX_HEADER_BYTES = 100 * 1024 * 1024
_MAX_DIMS = 16
_ITEM_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a file, checked."""

    name: str
    stored_dtype: str  # the safetensors name, "BF16"
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int

    @property
    def dtype(self) -> str | None:
        """The manifest's name of the dtype; None for those llmc cannot hold (float64, fp8 e5m2, ...)."""
        return FROM_SAFETENSORS.get(self.stored_dtype)


def read_header(fd: int, where: str) -> dict[str, TensorEntry]:
    """Check a safetensors header.

    Args:
        fd: the open file.
        where: how messages call it.

    Returns:
        Name -> entry, in the order of the header.

    Raises:
        ArtifactError: one sentence about what is wrong with the file.
    """
    size = os.fstat(fd).st_size
    length = int.from_bytes(_pread(fd, 8, 0, size, where), "little")
    if length > MAX_HEADER_BYTES:
        raise ArtifactError(
            f"{where}: header of {length} bytes, a safetensors header may have {MAX_HEADER_BYTES}; the file is damaged or foreign"
        )
    if 8 + length > size:
        raise ArtifactError(
            f"{where}: header of {length} bytes does not fit the file of {size}; the file is cut short or is not safetensors"
        )
    table = _parse(_pread(fd, length, 8, size, where), where)
    entries = {name: _entry(name, value, 8 + length, size, where) for name, value in table.items() if name != "__metadata__"}
    _check_no_overlap(list(entries.values()), where)
    return entries


class Checkpoint:
    """One or more safetensors files read as one table of tensors. Tensors are mapped, so they take no anonymous memory.

    with Checkpoint(sorted(folder.glob("*.safetensors"))) as checkpoint:
        embed = checkpoint.fetch("model.embed_tokens.weight")
    """

    def __init__(self, files: list[Path]) -> None:
        """
        Raises:
            ArtifactError: a file is damaged, or two files hold a tensor of the same name.
        """
        self.entries: dict[str, TensorEntry] = {}
        self._file_of: dict[str, Path] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        try:
            for path in files:
                self._add(path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor llmc can hold, as `recipes.infer` wants it."""
        return {name: (entry.dtype, entry.shape) for name, entry in self.entries.items() if entry.dtype is not None}

    def file_of(self, name: str) -> Path:
        return self._file_of[name]

    def fetch(self, name: str) -> Array:
        """A read-only view of one tensor in the mapped file (bf16 as uint16). Valid while the view lives.

        Raises:
            ArtifactError: there is no such tensor, or llmc cannot hold its dtype.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise ArtifactError(f"the checkpoint holds no tensor {name!r}; it belongs to another model or is incomplete")
        if entry.dtype is None:
            held = ", ".join(sorted(FROM_SAFETENSORS))
            raise ArtifactError(f"{self._file_of[name]}: tensor {name!r} has dtype {entry.stored_dtype}, llmc reads {held}")
        if entry.nbytes == 0:
            return np.zeros(entry.shape, dtype=NUMPY[entry.dtype])
        values = np.frombuffer(self._maps[self._file_of[name]], dtype=np.uint8, count=entry.nbytes, offset=entry.offset)
        # Offsets need not be multiples of the element size; numpy then reads unaligned, which is slower but right.
        return values.view(NUMPY[entry.dtype]).reshape(entry.shape)

    def close(self) -> None:
        """Forget the files; views handed out stay valid and keep their mapping."""
        self._maps.clear()

    def _add(self, path: Path) -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be opened: {os.strerror(error.errno or 0)}") from error
        try:
            entries = read_header(fd, str(path))
            for name in entries:
                if name in self.entries:
                    raise ArtifactError(
                        f"{path}: tensor {name[:200]!r} is also in {self._file_of[name]}; one of the two files does not belong here"
                    )
            self._maps[path] = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)
        self.entries.update(entries)
        self._file_of.update(dict.fromkeys(entries, path))


def _pread(fd: int, size: int, offset: int, file_size: int, where: str) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = os.pread(fd, size - len(data), offset + len(data))
        if not piece:
            raise ArtifactError(f"{where}: {file_size} bytes are too few for a safetensors file; the file is cut short")
        data += piece
    return bytes(data)


def _parse(text: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ArtifactError(f"{where}: the header names {twice[:200]!r} twice")
        return table

    if not text.startswith(b"{"):
        raise ArtifactError(f"{where}: the header does not begin with '{{'; this is not a safetensors file")
    try:
        table = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ArtifactError(f"{where}: the header is nested too deeply; the file is foreign") from None
    except ValueError as error:
        raise ArtifactError(f"{where}: the header is not valid JSON ({error}); the file is damaged") from None
    if not isinstance(table, dict):
        raise ArtifactError(f"{where}: the header is not a JSON object; the file is foreign")
    metadata = table.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ArtifactError(f"{where}: __metadata__ must map names to text; the file is foreign")
    return table


def _entry(name: str, value: Any, data_start: int, file_size: int, where: str) -> TensorEntry:
    label = f"{where}: tensor {name[:200]!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"{label}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BITS:
        raise ArtifactError(f"{label}: unknown dtype {str(dtype)[:50]!r}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS:
        raise ArtifactError(f"{label}: its shape is not a list of at most {_MAX_DIMS} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ArtifactError(f"{label}: data_offsets are not two rising numbers")
    start, end = offsets
    if data_start + end > file_size:
        raise ArtifactError(f"{label}: ends at byte {data_start + end} of a file of {file_size}; the file is cut short")
    bits = _ITEM_BITS[dtype]
    for dim in shape:
        bits *= dim
        if bits > 8 * file_size:  # also keeps the product small
            break
    if 0 not in shape and bits != 8 * (end - start):
        raise ArtifactError(f"{label}: {dtype} {shape} does not take the {end - start} bytes it is given")
    if 0 in shape and end != start:
        raise ArtifactError(f"{label}: {dtype} {shape} is empty but is given {end - start} bytes")
    return TensorEntry(name=name, stored_dtype=dtype, shape=tuple(shape), offset=data_start + start, nbytes=end - start)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)


def _check_no_overlap(entries: list[TensorEntry], where: str) -> None:
    end, owner = 0, ""
    for entry in sorted((e for e in entries if e.nbytes), key=lambda e: e.offset):
        if entry.offset < end:
            raise ArtifactError(f"{where}: tensors {owner[:200]!r} and {entry.name[:200]!r} overlap; the file is damaged or foreign")
        end, owner = entry.offset + entry.nbytes, entry.name
