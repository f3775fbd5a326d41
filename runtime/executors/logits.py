"""The program's logits as float32, whatever the model computes in."""

from __future__ import annotations

import numpy as np

from llmc.errors import ArtifactError

_KEEP_BYTES = 64 << 20  # a larger conversion (prompt log-probabilities) is not worth holding on to


class LogitsBuffer:
    """Converts [N, V] into memory kept from step to step. float32 passes through without a copy."""

    def __init__(self, dtype: str) -> None:
        if dtype not in ("float32", "float16", "bfloat16"):
            raise ArtifactError(f"logits of dtype {dtype}; float32, float16 or bfloat16 is expected; compile again")
        self._dtype = dtype
        self._buffer = np.empty(0, dtype=np.float32)

    def to_float32(self, logits: np.ndarray) -> np.ndarray:
        """float32 [N, V], valid until the next call (and, for float32, as long as `logits` is). bfloat16 is given as uint16."""
        if self._dtype == "float32":
            return logits
        if logits.size > self._buffer.size:
            fresh = np.empty(logits.size, dtype=np.float32)
            if fresh.nbytes <= _KEEP_BYTES:
                self._buffer = fresh
        else:
            fresh = self._buffer
        wide = fresh[: logits.size].reshape(logits.shape)
        if self._dtype == "float16":
            np.copyto(wide, logits)
        else:  # bfloat16 is the upper half of a float32
            np.left_shift(logits, 16, out=wide.view(np.uint32), dtype=np.uint32)
        return wide
