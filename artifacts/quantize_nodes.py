"""Quantising recipes: a matrix as small integers with a scale per row and group of columns, packed for the kernels.

Symmetric, round to nearest, ties to even. For each row of W [N, K] and each run of `group` columns (the last may be shorter), with
`top` = 127 for 8 bits and 7 for 4, everything in float32:
    scale = the smallest value of W's dtype that is not below max |w| / top
    q     = w / scale rounded to nearest even, held to [-top, top]; 0 where the scale is 0
What W is afterwards is q * scale, rounded once to W's dtype. A NaN or an infinity in W cannot be quantised and is refused.

Where all of W's rows are integers of a quantised checkpoint (stored_nodes.py), these and their scales are taken as they are, so that
W is afterwards exactly what it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.artifacts.casts import cast
from llmc.artifacts.dtypes import FLOATS, NUMPY, Array
from llmc.artifacts.recipe_nodes import PACK_K, PACK_N, Data, Node
from llmc.artifacts.stored_nodes import stored_leaves, stored_rows
from llmc.errors import ArtifactError

TOP = {8: 127, 4: 7}
_RUN_ELEMENTS = 1 << 19  # of W, widened to float32 at once

Wide = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class _Quantizing(Node, ABC):
    """W [N, K] of a float type, quantised. Rows of the result are panels of 16 rows of W."""

    input: Node
    bits: int
    group: int
    stored: bool = False  # the input is made of a quantised checkpoint's integers

    def rows(self, data: Data, start: int, stop: int) -> Array:
        result = np.empty((stop - start, *self.shape[1:]), dtype=NUMPY[self.dtype])
        per_run = max(1, _RUN_ELEMENTS // (PACK_N * self.input.shape[1]))
        for first in range(start, stop, per_run):
            last = min(first + per_run, stop)
            result[first - start : last - start] = (
                self._stored(data, first, last) if self.stored else self._panels(self._groups(data, first, last))
            )
        return result

    @abstractmethod
    def _panels(self, groups: Wide) -> Array:
        """The result's panels for [panels * 16, number of groups, group] weights."""

    @abstractmethod
    def _stored(self, data: Data, start: int, stop: int) -> Array:
        """The result's panels [start, stop) from integers and scales of the checkpoint."""

    def _padded(self, data: Data, start: int, stop: int, width: int, *, scales: bool) -> Array:
        """Rows of panels [start, stop) of the checkpoint's integers or scales, zero padded to whole panels and `width`."""
        rows = stored_rows(self.input, data, self.group, start * PACK_N, min(stop * PACK_N, self.input.shape[0]), scales=scales)
        padded = np.zeros(((stop - start) * PACK_N, width), dtype=rows.dtype)
        padded[: len(rows), : rows.shape[1]] = rows
        return padded

    def _groups(self, data: Data, start: int, stop: int) -> Wide:
        """Rows of panels [start, stop) in float32, zero padded to whole panels and whole groups."""
        n, k = self.input.shape
        rows = cast(self.input.rows(data, start * PACK_N, min(stop * PACK_N, n)), self.input.dtype, "float32")
        num_groups = -(-k // self.group)
        padded = np.zeros(((stop - start) * PACK_N, num_groups * self.group), dtype=np.float32)
        padded[: len(rows), :k] = rows
        return padded.reshape(len(padded), num_groups, self.group)

    def _scales(self, groups: Wide) -> tuple[Array, Wide]:
        return group_scales(groups, TOP[self.bits], self.input.dtype)


def group_scales(groups: Wide, top: float, dtype: str) -> tuple[Array, Wide]:
    """[rows, number of groups] scales of weights [rows, number of groups, group], as `dtype` and in float32.

    Raises:
        ArtifactError: a weight is no number.
    """
    wanted = np.abs(groups).max(axis=2) / np.float32(top)
    if not np.isfinite(wanted).all():
        raise ArtifactError("a weight holds NaN or infinity and cannot be quantised; compile without --quantization")
    near = cast(wanted, "float32", dtype)
    below = cast(near, dtype, "float32") < wanted
    if below.any():  # the next value up: of a positive float, the bits plus one
        as_integers = near.view(np.dtype(f"u{near.dtype.itemsize}"))
        near = (as_integers + below.astype(as_integers.dtype)).view(near.dtype)
    return near, np.asarray(cast(near, dtype, "float32"), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Quantize(_Quantizing):
    """The integers, in pairs along K as 16-bit types are packed; 4-bit ones two to a byte, 8 added, the even column low."""

    @staticmethod
    def packed_spec(bits: int, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        n, k = shape
        panels, pairs = -(-n // PACK_N), -(-k // PACK_K) * (PACK_K // 2)
        return ("int8", (panels, pairs, PACK_N, 2)) if bits == 8 else ("uint8", (panels, pairs, PACK_N))

    def _panels(self, groups: Wide) -> Array:
        _, scales = self._scales(groups)
        divisors = np.where(scales == 0, np.float32(1), scales)[..., np.newaxis]
        quants = np.rint(groups / divisors)
        np.clip(quants, -TOP[self.bits], TOP[self.bits], out=quants)
        depth = self.shape[1] * 2  # K padded to 32, which may be less than whole groups
        return self._in_pairs(quants.astype(np.int8).reshape(len(quants), -1)[:, :depth])

    def _stored(self, data: Data, start: int, stop: int) -> Array:
        return self._in_pairs(self._padded(data, start, stop, self.shape[1] * 2, scales=False).astype(np.int8))

    def _in_pairs(self, flat: npt.NDArray[np.int8]) -> Array:
        """int8 [panels * 16, depth] as the result's panels."""
        depth = flat.shape[1]
        pairs = flat.reshape(-1, PACK_N, depth // 2, 2).transpose(0, 2, 1, 3)
        if self.bits == 8:
            return pairs
        nibbles = (pairs + np.int8(8)).astype(np.uint8)
        return nibbles[..., 0] | (nibbles[..., 1] << np.uint8(4))


@dataclass(frozen=True, kw_only=True)
class QuantizeScales(_Quantizing):
    """The scales, [panels, groups, 16] in W's dtype."""

    @staticmethod
    def packed_shape(group: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        n, k = shape
        return (-(-n // PACK_N), -(-k // group), PACK_N)

    def _panels(self, groups: Wide) -> Array:
        scales, _ = self._scales(groups)
        return scales.reshape(-1, PACK_N, scales.shape[1]).transpose(0, 2, 1)

    def _stored(self, data: Data, start: int, stop: int) -> Array:
        scales = self._padded(data, start, stop, self.shape[1], scales=True)
        return scales.reshape(-1, PACK_N, scales.shape[1]).transpose(0, 2, 1)


def quantizing_node(op: str, bits: Any, group: Any, child: Node) -> Node:
    """The node of a `quantize` or `quantize_scales`.

    Raises:
        ArtifactError: bits, group or what is quantised are none that the kernels take.
    """
    if type(bits) is not int or bits not in TOP or type(group) is not int or not 0 < group <= 1 << 20 or group % PACK_K:
        raise ArtifactError(
            f"a recipe's {op} has bits {str(bits)[:20]} and group {str(group)[:20]}; expected 8 or 4 bits and a multiple of {PACK_K}"
        )
    if child.dtype not in FLOATS or len(child.shape) != 2 or 0 in child.shape:
        raise ArtifactError(f"a recipe's {op} of {child.dtype} {list(child.shape)}; quantised are [N, K] of {', '.join(FLOATS)}")
    leaves = stored_leaves(child)
    for leaf in leaves or ():
        if leaf.held_bits > bits or (leaf.group % group and leaf.group < leaf.shape[1]):
            raise ArtifactError(
                f"a recipe's {op} asks for {bits} bits in groups of {group} of a weight stored with {leaf.bits} bits in groups of "
                f"{leaf.group}{'' if leaf.symmetric else ' and zero points'}; that would round it again"
            )
    if op == "quantize":
        dtype, shape = Quantize.packed_spec(bits, child.shape)
        return Quantize(dtype, shape, input=child, bits=bits, group=group, stored=leaves is not None)
    return QuantizeScales(
        child.dtype, QuantizeScales.packed_shape(group, child.shape), input=child, bits=bits, group=group, stored=leaves is not None
    )
