"""The packed weight layout, in numpy, one whole matrix at a time: what tests and benchmarks use.

W [N, K] becomes, with zero padding,
    16-bit types: [ceil(N/16), ceil(K/32)*16, 16, 2]   element (n, k) at [n // 16, k // 2, n % 16, k % 2]
    float32:      [ceil(N/16), K, 16]                  element (n, k) at [n // 16, k, n % 16]
bf16 is carried as its uint16 bits. The compiler writes the same bytes by streaming (artifacts/recipes.py).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llmc.errors import ConfigError

PACK_N = 16  # rows of W per panel
PACK_K = 32  # K of 16-bit types is padded to a multiple of this, one AMX tile of depth

Array = npt.NDArray[np.generic]


def packed_shape(n: int, k: int, dtype: npt.DTypeLike) -> tuple[int, ...]:
    """Shape of the packed form of a [n, k] matrix.

    Raises:
        ConfigError: dtype is none of float32, float16, uint16 (bf16 bits).
    """
    panels = -(-n // PACK_N)
    if np.dtype(dtype) == np.float32:
        return (panels, k, PACK_N)
    _check_16_bit(dtype)
    return (panels, -(-k // PACK_K) * (PACK_K // 2), PACK_N, 2)


def pack(w: Array) -> Array:
    """Pack w [N, K] (float32, float16, or uint16 holding bf16 bits); returns a new C-contiguous array of `packed_shape`."""
    n, k = w.shape
    shape = packed_shape(n, k, w.dtype)
    depth = k if w.dtype == np.float32 else shape[1] * 2
    padded = np.zeros((shape[0] * PACK_N, depth), dtype=w.dtype)
    padded[:n, :k] = w
    if w.dtype == np.float32:
        return np.ascontiguousarray(padded.reshape(shape[0], PACK_N, k).transpose(0, 2, 1))
    return np.ascontiguousarray(padded.reshape(shape[0], PACK_N, shape[1], 2).transpose(0, 2, 1, 3))


def unpack(packed: Array, n: int, k: int) -> Array:
    """The [n, k] matrix inside `packed`.

    Raises:
        ConfigError: `packed` has not the shape an [n, k] matrix of its dtype packs to.
    """
    if packed.shape != packed_shape(n, k, packed.dtype):
        raise ConfigError(f"packed weight has shape {packed.shape}, but [{n}, {k}] packs to {packed_shape(n, k, packed.dtype)}")
    order = (0, 2, 1) if packed.ndim == 3 else (0, 2, 1, 3)
    rows = packed.transpose(order).reshape(packed.shape[0] * PACK_N, -1)
    return np.ascontiguousarray(rows[:n, :k])


def _check_16_bit(dtype: npt.DTypeLike) -> None:
    if np.dtype(dtype) not in (np.dtype(np.float16), np.dtype(np.uint16)):
        raise ConfigError(f"cannot pack dtype {np.dtype(dtype)}; accepted: float32, float16, uint16 (bf16 bits)")
