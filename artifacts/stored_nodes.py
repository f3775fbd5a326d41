"""Weights that a checkpoint holds as small integers already: the layouts of GPTQ, AWQ and compressed-tensors, as one recipe op.

    {"op": "dequantize", "form": F, "bits": B, "group": G, "symmetric": S, "dtype": D, "shape": [N, K], "inputs": [q, scales, zeros?]}

The value is (q - zero) * scale, computed in float32 and rounded once to D. Groups run along K, `group` inputs each, the last may be
shorter; a group of K or more is one per row. Bits lie from the lowest of a 32-bit word up.

    form          integers                                       scales        zeros, stored value
    gptq          int32 [K * B / 32, N], words along K           [groups, N]   int32 [groups, N * B / 32], zero - 1
    gptq_v2       the same                                       [groups, N]   int32 [groups, N * B / 32], zero
    awq           int32 [K, N * B / 32], columns 0 2 4 6 1 3 5 7 [groups, N]   int32 [groups, N * B / 32] in that order, zero
    packed_rows   int32 [N, K * B / 32], words along K           [N, groups]   int32 [N * B / 32, groups], words along N, zero
    int8_rows     int8 [N, K], signed                            [N, groups]   none
    fp8_rows      float8_e4m3fn [N, K]                           [N, 1] or [1] none

In packed_rows integers and zeros carry an offset of 2^(B-1), which cancels; without zeros the offset is taken off. With `symmetric`
every zero must be 2^(B-1), which is checked where zeros are stored.

Sources: GPTQModel and AutoGPTQ (`QuantLinear.pack`), AutoAWQ (`WQLinear_GEMM.from_linear`), compressed-tensors
(`pack_quantized` compressor), each as its documentation and checkpoints describe it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.artifacts import float8
from llmc.artifacts.casts import cast
from llmc.artifacts.dtypes import FLOATS, Array
from llmc.artifacts.recipe_nodes import Concat, Data, Node, Slice
from llmc.errors import ArtifactError

FORMS = ("gptq", "gptq_v2", "awq", "packed_rows", "int8_rows", "fp8_rows")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # place in a word -> column

Ints = npt.NDArray[np.int16]


@dataclass(frozen=True, kw_only=True)
class Dequantize(Node):
    """One matrix [N, K] of a quantised checkpoint."""

    form: str
    bits: int
    group: int
    symmetric: bool
    quants: Node
    scales: Node
    zeros: Node | None

    @property
    def held_bits(self) -> int:
        """Bits that hold q - zero: a zero point that is not fixed adds one."""
        return self.bits if self.symmetric else self.bits + 1

    def rows(self, data: Data, start: int, stop: int) -> Array:
        is_fp8 = self.form == "fp8_rows"
        ints = float8.decode(self.codes(data, start, stop)) if is_fp8 else self.integers(data, start, stop).astype(np.float32)
        scales = np.asarray(cast(self.scale_rows(data, start, stop), self.dtype, "float32"), dtype=np.float32)
        ints *= np.repeat(scales, min(self.group, self.shape[1]), axis=1)[:, : self.shape[1]]
        return cast(ints, "float32", self.dtype)

    def codes(self, data: Data, start: int, stop: int) -> Array:
        """The bytes of fp8 rows [start, stop), [rows, K].

        Raises:
            ArtifactError: there is a NaN among them.
        """
        rows = np.asarray(self.quants.whole(data)[start:stop], dtype=np.uint8)
        if ((rows & 0x7F) == 0x7F).any():
            raise ArtifactError(f"a quantised weight of {list(self.shape)}, stored as fp8, holds a NaN; the checkpoint is damaged")
        return rows

    def integers(self, data: Data, start: int, stop: int) -> Ints:
        """q - zero of rows [start, stop), [rows, K]."""
        n, k = self.shape
        offset = 0 if self.form == "int8_rows" else 1 << (self.bits - 1)
        stored = self.quants.whole(data)
        if self.form == "int8_rows":
            return stored[start:stop].astype(np.int16)
        if self.form == "packed_rows":
            ints = _unpack(stored[start:stop], self.bits)[:, :k]
        elif self.form == "awq":
            ints = _awq_columns(stored, start, stop).T
        else:
            ints = _unpack(np.ascontiguousarray(stored[:, start:stop].T), self.bits)[:, :k]
        if self.zeros is None:
            return ints - np.int16(offset)
        zeros = self._zero_rows(self.zeros.whole(data), start, stop)
        if self.symmetric and (zeros != offset).any():
            raise ArtifactError(
                f"a quantised weight of [{n}, {k}] is said to be symmetric and has zero points other than {offset}; "
                "its quantization_config and its tensors do not belong together"
            )
        return ints - np.repeat(zeros, min(self.group, k), axis=1)[:, :k]

    def _zero_rows(self, stored: Array, start: int, stop: int) -> Ints:
        """[rows, groups] zero points."""
        if self.form == "packed_rows":
            return _unpack(np.ascontiguousarray(stored.T), self.bits)[:, start:stop].T
        if self.form == "awq":
            return _awq_columns(stored, start, stop).T
        zeros = _unpack(stored, self.bits)[:, start:stop].T
        if self.form == "gptq_v2":
            return zeros
        if (zeros == (1 << self.bits) - 1).any():
            raise ArtifactError(
                "a GPTQ weight stores a zero point of all ones, which writers of this layout mean as 0 or as "
                f"{1 << self.bits}; save the checkpoint as checkpoint_format gptq_v2, which says which"
            )
        return zeros + np.int16(1)

    def scale_rows(self, data: Data, start: int, stop: int) -> Array:
        """[rows, groups] scales in this node's dtype."""
        stored = self.scales.whole(data)
        if self.scales.shape == (1,):
            stored = np.broadcast_to(stored, (self.shape[0], 1))
        rows = stored[start:stop] if self.form in ("packed_rows", "int8_rows", "fp8_rows") else stored[:, start:stop].T
        return cast(np.ascontiguousarray(rows), self.scales.dtype, self.dtype)


def _unpack(words: Array, bits: int) -> Ints:
    """int32 [rows, words] -> [rows, words * 32 / bits], lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    values = (np.ascontiguousarray(words).view(np.uint32)[..., np.newaxis] >> shifts) & np.uint32((1 << bits) - 1)
    return values.reshape(len(words), -1).astype(np.int16)


def _awq_columns(words: Array, start: int, stop: int) -> Ints:
    """Columns [start, stop) of int32 [rows, words], eight columns to a word in AWQ's order."""
    first = start // 8
    values = _unpack(words[:, first : -(-stop // 8)], 4).reshape(len(words), -1, 8)
    columns = values[..., np.argsort(_AWQ_ORDER)].reshape(len(words), -1)
    return columns[:, start - first * 8 : stop - first * 8]


def stored_leaves(node: Node, *, fp8: bool = False) -> list[Dequantize] | None:
    """The matrices of integers, or of fp8, whose rows make up `node`; None if anything else has a part in it."""
    if isinstance(node, Dequantize):
        return [node] if (node.form == "fp8_rows") is fp8 else None
    if isinstance(node, Slice) and node.axis == 0:
        return stored_leaves(node.input, fp8=fp8)
    if isinstance(node, Concat) and node.axis == 0:
        found = [stored_leaves(child, fp8=fp8) for child in node.inputs]
        return None if any(part is None for part in found) else [leaf for part in found if part is not None for leaf in part]
    return None


def stored_rows(node: Node, data: Data, group: int, start: int, stop: int, *, scales: bool) -> Array:
    """Rows [start, stop) of what `stored_leaves` found.

    Integers [rows, K] int16 or fp8 [rows, K] uint8; or their scales [rows, groups of `group`].
    """
    if isinstance(node, Dequantize):
        if not scales:
            return node.codes(data, start, stop) if node.form == "fp8_rows" else node.integers(data, start, stop)
        starts = np.arange(0, node.shape[1], group)
        return node.scale_rows(data, start, stop)[:, starts // node.group]
    if isinstance(node, Slice):
        return stored_rows(node.input, data, group, node.start + start, node.start + stop, scales=scales)
    assert isinstance(node, Concat)
    parts, first = [], 0
    for child in node.inputs:
        lo, hi = max(start - first, 0), min(stop - first, child.shape[0])
        if lo < hi:
            parts.append(stored_rows(child, data, group, lo, hi, scales=scales))
        first += child.shape[0]
    return np.concatenate(parts)


def dequantizing_node(recipe: Any, inputs: list[Node]) -> Dequantize:
    """The node of a `dequantize`.

    Raises:
        ArtifactError: an unknown form, or tensors that are not of its layout.
    """
    form, bits, group, dtype, shape = (recipe[name] for name in ("form", "bits", "group", "dtype", "shape"))
    sizes_fit = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and 0 < size <= 1 << 24 for size in shape)
    if form not in FORMS or bits not in (4, 8) or type(group) is not int or group < 1 or dtype not in FLOATS or not sizes_fit:
        raise ArtifactError(
            f"a recipe's dequantize has form {str(form)[:20]}, bits {str(bits)[:9]}, group {str(group)[:20]}, dtype {str(dtype)[:20]} and "
            f"shape {str(shape)[:50]}; expected one of {', '.join(FORMS)}, 4 or 8 bits, a float type and [N, K]"
        )
    if len(inputs) not in (2, 3) or type(recipe["symmetric"]) is not bool or (form == "awq" and bits != 4):
        raise ArtifactError(
            f"a recipe's dequantize of form {form} has {len(inputs)} inputs; expected integers, scales and perhaps zero points"
        )
    for found, wanted in zip(inputs, _layout(form, bits, group, shape), strict=False):
        expected = (FLOATS if wanted[0] == "float" else (wanted[0],), wanted[1])
        of_all = form == "fp8_rows" and wanted[0] == "float" and found.shape == (1,)  # one scale for the whole matrix
        if found.dtype not in expected[0] or (found.shape != expected[1] and not of_all):
            raise ArtifactError(
                f"a quantised weight of {shape} in the layout {form} has a part {found.dtype} {list(found.shape)}, "
                f"expected {wanted[0]} {list(wanted[1])}; its quantization_config and its tensors do not belong together"
            )
    if form in ("int8_rows", "fp8_rows") and len(inputs) == 3:
        raise ArtifactError("a quantised weight of plain int8 or fp8 with zero points is not read; expected a symmetric one")
    if form == "fp8_rows" and (bits != 8 or group < shape[1]):
        raise ArtifactError(f"a quantised weight of fp8 has {bits} bits in groups of {group}; expected 8 and whole rows, {shape[1]}")
    return Dequantize(
        dtype,
        tuple(shape),
        form=form,
        bits=bits,
        group=group,
        symmetric=recipe["symmetric"],
        quants=inputs[0],
        scales=inputs[1],
        zeros=inputs[2] if len(inputs) == 3 else None,
    )


def _layout(form: str, bits: int, group: int, shape: list[int]) -> list[tuple[str, tuple[int, ...]]]:
    """dtype ("float" for any) and shape of integers, scales and zero points."""
    n, k = shape
    per_word, groups = 32 // bits, -(-k // group)
    words_k, words_n = -(-k // per_word), -(-n // per_word)
    if form in ("gptq", "gptq_v2"):
        return [("int32", (words_k, n)), ("float", (groups, n)), ("int32", (groups, words_n))]
    if form == "awq":
        return [("int32", (k, words_n)), ("float", (groups, n)), ("int32", (groups, words_n))]
    if form == "packed_rows":
        return [("int32", (n, words_k)), ("float", (n, groups)), ("int32", (words_n, groups))]
    return [("int8" if form == "int8_rows" else float8.NAME, (n, k)), ("float", (n, groups))]
