"""The program's logits: their largest as they are, or all of them as float32, whatever the model computes in."""

from __future__ import annotations

import numpy as np

from llmc.errors import ArtifactError

_KEEP_BYTES = 64 << 20  # a larger conversion (prompt log-probabilities) is not worth holding on to
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00}  # the bits of the positive one
_SIGN = 0x8000


class LogitsBuffer:
    """Converts [N, V] into memory kept from step to step. float32 passes through without a copy."""

    def __init__(self, dtype: str) -> None:
        if dtype not in ("float32", "float16", "bfloat16"):
            raise ArtifactError(f"logits of dtype {dtype}; float32, float16 or bfloat16 is expected; compile again")
        self.dtype = dtype
        self._buffer = np.empty(0, dtype=np.float32)

    def to_float32(self, logits: np.ndarray) -> np.ndarray:
        """float32 [N, V], valid until the next call (and, for float32, as long as `logits` is). bfloat16 is given as uint16."""
        if self.dtype == "float32":
            return logits
        if logits.size > self._buffer.size:
            fresh = np.empty(logits.size, dtype=np.float32)
            if fresh.nbytes <= _KEEP_BYTES:
                self._buffer = fresh
        else:
            fresh = self._buffer
        wide = fresh[: logits.size].reshape(logits.shape)
        if self.dtype == "float16":
            np.copyto(wide, logits)
        else:  # bfloat16 is the upper half of a float32
            np.left_shift(logits, 16, out=wide.view(np.uint32), dtype=np.uint32)
        return wide


class Logits:
    """The logits [N, V] of one step, widened only when somebody asks: of most rows no more than the largest is wanted.

    Valid until the executor's next run.

    Args:
        given: what the program gave, in the dtype of `buffer`, bfloat16 as uint16.
        buffer: of the executor; None: `given` is float32.
    """

    def __init__(self, given: np.ndarray, buffer: LogitsBuffer | None = None) -> None:
        self._given = given
        self._buffer = buffer
        self._wide = given if buffer is None or buffer.dtype == "float32" else None

    def __len__(self) -> int:
        return len(self._given)

    def to_float32(self) -> np.ndarray:
        """float32 [N, V], the same memory at each call; a row may be changed by the one who samples from it."""
        if self._wide is None:
            assert self._buffer is not None
            self._wide = self._buffer.to_float32(self._given)
        return self._wide

    def largest(self) -> list[int]:
        """Of each row the first of its largest entries, as argmax over float32 has it; -1 where that is infinite or a NaN is in the row."""
        if self._wide is None:
            assert self._buffer is not None
            return _largest_of_bits(self._given.view(np.uint16), _INFINITY[self._buffer.dtype])
        found = self._wide.argmax(axis=1)  # the first NaN if there is one
        return np.where(np.isfinite(self._wide[np.arange(len(found)), found]), found, -1).tolist()


def _largest_of_bits(bits: np.ndarray, infinity: int) -> list[int]:
    """`Logits.largest` of 16-bit floats given as uint16 [N, V].

    The bits of positive numbers order as integers do, those of negative ones the other way round. So a row's largest is its largest
    signed integer if that is above 0, and its smallest unsigned one if every sign is set.
    """
    signed = bits.view(np.int16)
    found: list[int] = []
    for row, (index, farthest) in enumerate(zip(signed.argmax(axis=1).tolist(), bits.argmax(axis=1).tolist(), strict=True)):
        value = signed.item(row, index)
        if bits.item(row, farthest) > (_SIGN | infinity):
            index = -1  # a NaN with its sign set, which x86 makes of inf - inf, lies beyond all others
        elif value < 0:
            index = int(bits[row].argmin())
            index = index if bits.item(row, index) < (_SIGN | infinity) else -1
        elif value == 0:
            index = int((bits[row] & (_SIGN - 1)).argmin())  # zeros of either sign are equal
        elif value >= infinity:
            index = -1
        found.append(index)
    return found
