"""Images without code: the parts of a cubin that a plan is held against, for kernels that a test runs in Python."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence


def toy_cubin(kernels: Mapping[str, Sequence[int]], architecture: int = 90) -> bytes:
    """An ELF file with an entry per name; its parameters have the sizes given, each at the next multiple of its size."""
    names = b"\0.shstrtab\0"
    sections = [b""]
    labels = [0]
    for entry, sizes in kernels.items():
        attributes = b""
        for ordinal, (offset, size) in enumerate(parameters(sizes)):
            attributes += struct.pack("<BBHIHHI", 4, 0x17, 12, 0, ordinal, offset, size << 18)
        labels.append(len(names))
        names += f".nv.info.{entry}\0".encode()
        sections.append(attributes)
    labels.append(1)
    sections.append(names)
    body, headers = b"", b""
    for index, (label, data) in enumerate(zip(labels, sections, strict=True)):
        kind = 0 if index == 0 else 3 if data is names else 1
        headers += struct.pack("<IIQQQQIIQQ", label, kind, 0, 0, 64 + len(body) if data else 0, len(data), 0, 0, 1, 0)
        body += data
    head = b"\x7fELF\x02\x01\x01\x33\x07" + b"\0" * 7
    head += struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, 64 + len(body), architecture, 64, 56, 0, 64, len(sections), len(sections) - 1)
    return head + body + headers


def parameters(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(offset, size) of each parameter."""
    places, end = [], 0
    for size in sizes:
        offset = -(-end // size) * size
        places.append((offset, size))
        end = offset + size
    return places
