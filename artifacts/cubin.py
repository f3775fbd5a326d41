"""Read a cubin: what a launch must match, from the image itself.

A cubin is an ELF file for one GPU architecture. Each kernel `<entry>` has a section `.nv.info.<entry>` of attributes (parameter
offsets and sizes, block size), and `.nv.info` has registers and stack per symbol. The image is the authority: what a plan says of a
kernel is held against this before a driver sees either. Nothing here runs or maps code, and every read is checked against the file.

Source: layout as printed by NVIDIA's `cuobjdump -elf`; ELF-64 as in the System V ABI, chapter 4.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from llmc.errors import ArtifactError

_MACHINE_CUDA = 190  # EM_CUDA
_MAX_SECTIONS = 4096
_MAX_SYMBOLS = 65536
_SYMTAB = 2  # SHT_SYMTAB
_NOBITS = 8  # SHT_NOBITS: a size in memory, no bytes in the file
_SIZED_VALUE = 4  # EIFMT_SVAL: a 16-bit size, then that many bytes; every other form has its two bytes in place

# Attributes, EIATTR_*.
_FRAME_SIZE = 0x11
_REQUIRED_THREADS = 0x10
_PARAMETER = 0x17
_REGISTERS = 0x2F


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One entry of an image.

    parameters: (offset, size) in bytes of each, in order; the first need not be at 0.
    threads: the block size it must be launched with, or None if it says nothing.
    registers: per thread. frame_bytes: stack per thread; more than 0 means spilled registers or local arrays.
    shared_bytes: static shared memory, besides what a launch asks for.
    """

    entry: str
    parameters: tuple[tuple[int, int], ...] = ()
    threads: tuple[int, int, int] | None = None
    registers: int = 0
    frame_bytes: int = 0
    shared_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cubin:
    """An image: the architecture it runs on, as 90 for sm_90, and its kernels by entry name."""

    architecture: int
    kernels: Mapping[str, Kernel] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    kind: int
    offset: int
    size: int
    link: int


def read_cubin(data: bytes, where: str) -> Cubin:
    """Parse a cubin.

    Args:
        data: the whole file.
        where: how messages call it.

    Raises:
        ArtifactError: not a 64-bit CUDA ELF file, or an offset, size or name in it leads out of it.
    """
    try:
        return _read(data)
    except (struct.error, IndexError, ValueError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{where}: not a readable cubin ({error}); fetch the artifact again or compile again") from None


def _read(data: bytes) -> Cubin:
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("expected a little-endian 64-bit ELF file")
    (machine,) = struct.unpack_from("<H", data, 18)
    if machine != _MACHINE_CUDA:
        raise ValueError(f"ELF machine {machine}, expected {_MACHINE_CUDA}, CUDA")
    sections = _sections(data)
    symbols = _symbols(data, sections)
    kernels: dict[str, Kernel] = {}
    for section in sections:
        if section.name.startswith(".nv.info."):
            kernel = _kernel(data, section)
            if kernel.entry in kernels:
                raise ValueError(f"kernel {kernel.entry[:100]!r} is there twice")
            kernels[kernel.entry] = kernel
    for section in sections:
        if section.name == ".nv.info":
            _add_resources(data, section, symbols, kernels)
        elif section.name.startswith(".nv.shared.") and (entry := section.name.removeprefix(".nv.shared.")) in kernels:
            kernels[entry] = replace(kernels[entry], shared_bytes=section.size)
    if not kernels:
        raise ValueError("no kernel in it")
    return Cubin(architecture=_architecture(data), kernels=MappingProxyType(kernels))


def _architecture(data: bytes) -> int:
    """From e_flags: ABI version 8 (CUDA 13's tools) has the number in bits 8 to 15, version 7 in bits 0 to 7."""
    (flags,) = struct.unpack_from("<I", data, 48)
    return (flags >> 8) & 0xFF if data[8] >= 8 else flags & 0xFF


def _sections(data: bytes) -> list[_Section]:
    (start,) = struct.unpack_from("<Q", data, 40)
    entry_size, count, names_index = struct.unpack_from("<HHH", data, 58)
    if entry_size != 64 or not 0 < count <= _MAX_SECTIONS or names_index >= count:
        raise ValueError(f"{count} section headers of {entry_size} bytes")
    if start + count * entry_size > len(data):
        raise ValueError("section headers reach past the end")
    (segments,) = struct.unpack_from("<Q", data, 32)
    segment_size, num_segments = struct.unpack_from("<HH", data, 54)
    if segments + segment_size * num_segments > len(data):  # not read here, but by the driver
        raise ValueError("program headers reach past the end")
    raw = [struct.unpack_from("<IIQQQQIIQQ", data, start + index * entry_size) for index in range(count)]
    for header in raw:
        kind, offset, size = header[1], header[4], header[5]
        if kind != _NOBITS and offset + size > len(data):
            raise ValueError("a section reaches past the end")
    names = _Section("", raw[names_index][1], raw[names_index][4], raw[names_index][5], 0)
    return [_Section(_string(data, names, h[0]), h[1], h[4], h[5], h[6]) for h in raw]


def _string(data: bytes, table: _Section, index: int) -> str:
    if index >= table.size or table.kind == _NOBITS:
        raise ValueError("a name lies outside its table")
    end = data.index(b"\0", table.offset + index, table.offset + table.size)
    return data[table.offset + index : end].decode("utf-8")


def _symbols(data: bytes, sections: list[_Section]) -> dict[int, str]:
    """Symbol number -> name."""
    for section in sections:
        if section.kind == _SYMTAB:
            count = section.size // 24
            if count > _MAX_SYMBOLS:
                raise ValueError(f"{count} symbols")
            strings = sections[section.link]
            return {i: _string(data, strings, struct.unpack_from("<I", data, section.offset + 24 * i)[0]) for i in range(count)}
    return {}


def _attributes(data: bytes, section: _Section) -> Iterator[tuple[int, bytes]]:
    at, end = section.offset, section.offset + section.size
    while at < end:
        form, attribute = struct.unpack_from("<BB", data, at)
        if form == _SIZED_VALUE:
            (size,) = struct.unpack_from("<H", data, at + 2)
            if at + 4 + size > end:
                raise ValueError("an attribute reaches past its section")
            yield attribute, data[at + 4 : at + 4 + size]
            at += 4 + size
        else:
            yield attribute, data[at + 2 : at + 4]
            at += 4


def _kernel(data: bytes, section: _Section) -> Kernel:
    parameters: dict[int, tuple[int, int]] = {}
    threads: tuple[int, int, int] | None = None
    for attribute, value in _attributes(data, section):
        if attribute == _PARAMETER:
            _, ordinal, offset, bits = struct.unpack("<IHHI", value)
            parameters[ordinal] = (offset, bits >> 18)
        elif attribute == _REQUIRED_THREADS:
            threads = struct.unpack("<III", value)
    if sorted(parameters) != list(range(len(parameters))):
        raise ValueError(f"parameters {sorted(parameters)[:50]} are not numbered from 0")
    entry = section.name.removeprefix(".nv.info.")
    return Kernel(entry=entry, parameters=tuple(parameters[i] for i in range(len(parameters))), threads=threads)


def _add_resources(data: bytes, section: _Section, symbols: dict[int, str], kernels: dict[str, Kernel]) -> None:
    for attribute, value in _attributes(data, section):
        if attribute not in (_REGISTERS, _FRAME_SIZE):
            continue
        symbol, amount = struct.unpack("<II", value[:8])
        entry = symbols.get(symbol, "")
        if entry in kernels:
            name = "registers" if attribute == _REGISTERS else "frame_bytes"
            kernels[entry] = replace(kernels[entry], **{name: amount})
