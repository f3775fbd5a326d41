"""Element types by the manifest's names, their safetensors names, and how numpy carries them here: bf16 as uint16 bits, fp8 as bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]

NUMPY: dict[str, np.dtype[np.generic]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "float8_e4m3fn": np.dtype("u1"),
    "bool": np.dtype("?"),
}
SAFETENSORS: dict[str, str] = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3",
    "bool": "BOOL",
}
FROM_SAFETENSORS: dict[str, str] = {name: dtype for dtype, name in SAFETENSORS.items()}
FLOATS = ("float32", "float16", "bfloat16")
