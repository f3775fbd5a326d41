"""Element types by the manifest's names: their size and their safetensors names. No numpy here: the front process reads manifests too."""

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
    "bool": 1,
}
SAFETENSORS: dict[str, str] = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
FROM_SAFETENSORS: dict[str, str] = {name: dtype for dtype, name in SAFETENSORS.items()}


def nbytes_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a contiguous tensor."""
    size = ITEM_BYTES[dtype]
    for dim in shape:
        size *= dim
    return size
