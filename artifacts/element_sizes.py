"""Bytes per element, by the manifest's names. No numpy here: the front process reads manifests too."""

from __future__ import annotations

from collections.abc import Sequence

ITEM_BYTES: dict[str, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
    "float8_e4m3fn": 1,
    "bool": 1,
}


def nbytes_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a contiguous tensor."""
    size = ITEM_BYTES[dtype]
    for dim in shape:
        size *= dim
    return size
