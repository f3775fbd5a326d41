"""What each recipe op does to rows. A node knows its dtype and shape, and gives any run of its first dimension on demand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from llmc.artifacts.casts import cast
from llmc.artifacts.dtypes import NUMPY, Array

PACK_N = 16  # rows of W per panel
PACK_K = 32  # K of 16-bit types is padded to a multiple of this


class Data(Protocol):
    """Gives leaves their values."""

    def source(self, name: str) -> Array: ...

    def computed(self, key: str) -> Array: ...


@dataclass(frozen=True)
class Node(ABC):
    """One op of a checked recipe."""

    dtype: str
    shape: tuple[int, ...]

    @abstractmethod
    def rows(self, data: Data, start: int, stop: int) -> Array:
        """[stop - start, *shape[1:]], rows [start, stop) of the result; may be a view, not to be written to."""

    def whole(self, data: Data) -> Array:
        """The whole result; may be a view."""
        return self.rows(data, 0, self.shape[0])


@dataclass(frozen=True)
class Source(Node):
    name: str = ""
    is_computed: bool = False

    def rows(self, data: Data, start: int, stop: int) -> Array:
        return self.whole(data)[start:stop]

    def whole(self, data: Data) -> Array:
        return data.computed(self.name) if self.is_computed else data.source(self.name)


@dataclass(frozen=True)
class Literal(Node):
    values: Array = field(default_factory=lambda: np.zeros(0))

    def rows(self, data: Data, start: int, stop: int) -> Array:
        return self.values[start:stop]

    def whole(self, data: Data) -> Array:
        return self.values


@dataclass(frozen=True, kw_only=True)
class Cast(Node):
    input: Node

    def rows(self, data: Data, start: int, stop: int) -> Array:
        return cast(self.input.rows(data, start, stop), self.input.dtype, self.dtype)

    def whole(self, data: Data) -> Array:
        return cast(self.input.whole(data), self.input.dtype, self.dtype)


@dataclass(frozen=True, kw_only=True)
class Concat(Node):
    inputs: list[Node]
    axis: int

    def rows(self, data: Data, start: int, stop: int) -> Array:
        if self.axis:
            return np.concatenate([child.rows(data, start, stop) for child in self.inputs], axis=self.axis)
        parts, first = [], 0
        for child in self.inputs:
            lo, hi = max(start - first, 0), min(stop - first, child.shape[0])
            if lo < hi:
                parts.append(child.rows(data, lo, hi))
            first += child.shape[0]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, *self.shape[1:]), dtype=NUMPY[self.dtype])


@dataclass(frozen=True, kw_only=True)
class Stack(Node):
    inputs: list[Node]

    def rows(self, data: Data, start: int, stop: int) -> Array:
        if stop - start == 1:
            return self.inputs[start].whole(data)[np.newaxis]
        result = np.empty((stop - start, *self.shape[1:]), dtype=NUMPY[self.dtype])
        for index in range(start, stop):
            result[index - start] = self.inputs[index].whole(data)
        return result


@dataclass(frozen=True, kw_only=True)
class Slice(Node):
    input: Node
    axis: int
    start: int

    def rows(self, data: Data, start: int, stop: int) -> Array:
        if self.axis == 0:
            return self.input.rows(data, self.start + start, self.start + stop)
        index = (slice(None),) * self.axis + (slice(self.start, self.start + self.shape[self.axis]),)
        return self.input.rows(data, start, stop)[index]


@dataclass(frozen=True, kw_only=True)
class Transpose(Node):
    input: Node
    axes: tuple[int, ...]

    def rows(self, data: Data, start: int, stop: int) -> Array:
        if self.axes[0] == 0:
            return self.input.rows(data, start, stop).transpose(self.axes)
        return self.whole(data)[start:stop]

    def whole(self, data: Data) -> Array:
        return self.input.whole(data).transpose(self.axes)


@dataclass(frozen=True, kw_only=True)
class Reshape(Node):
    input: Node

    def rows(self, data: Data, start: int, stop: int) -> Array:
        return self.whole(data)[start:stop]

    def whole(self, data: Data) -> Array:
        return self.input.whole(data).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class Pack(Node):
    """W [.., N, K] in panels of 16 rows, K innermost-but-one; 16-bit types in pairs along K (docs/architecture.md)."""

    input: Node

    @staticmethod
    def packed_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        *lead, n, k = shape
        panels = -(-n // PACK_N)
        if dtype == "float32":
            return (*lead, panels, k, PACK_N)
        return (*lead, panels, -(-k // PACK_K) * (PACK_K // 2), PACK_N, 2)

    def rows(self, data: Data, start: int, stop: int) -> Array:
        """Rows of the result are panels of a matrix, or whole experts where there is a leading axis."""
        result = np.zeros((stop - start, *self.shape[1:]), dtype=NUMPY[self.dtype])
        if len(self.input.shape) == 2:
            last = min(stop * PACK_N, self.input.shape[0])
            self._pack(self.input.rows(data, start * PACK_N, last), result)
            return result
        for index in range(start, stop):
            values = self.input.rows(data, index, index + 1)[0]
            matrices = values.reshape(-1, *values.shape[-2:])
            panels = result[index - start].reshape(len(matrices), *self.shape[len(self.input.shape) - 2 :])
            for matrix, target in zip(matrices, panels, strict=True):
                self._pack(matrix, target)
        return result

    def _pack(self, w: Array, target: Array) -> None:
        """w [n, K] into target [ceil(n/16), ..], zeros where it is not written."""
        if self.dtype != "float32":
            # A pair along K is one 32-bit element: moved as such, half as many moves. Odd K: the last pair has a zero in it.
            if w.shape[1] % 2:
                w = np.pad(w, ((0, 0), (0, 1)))
            w = np.ascontiguousarray(w)
            w, target = w.view(np.uint32), target.view(np.uint32)[..., 0]
        n, k = w.shape
        full = n // PACK_N
        target[:full, :k] = w[: full * PACK_N].reshape(full, PACK_N, k).transpose(0, 2, 1)
        if n % PACK_N:
            target[full, :k, : n % PACK_N] = w[full * PACK_N :].T
