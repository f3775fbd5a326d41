"""Quantised matrices in rows, as a GPU's kernels read them: the integers and scales of `quantize_nodes.py`, each in another place.

8 bits   int8 [N, K]
4 bits   uint8 [N, ceil(K / 64) * 32]: of each run of 64 columns, byte j holds column j in its low half and column 32 + j in its high
         half, 8 added; columns past K are 0
scales   [N, ceil(K / group)] in W's dtype
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.artifacts.dtypes import NUMPY, Array
from llmc.artifacts.quantize_nodes import Quantize, QuantizeScales
from llmc.artifacts.recipe_nodes import PACK_N, Data, Node
from llmc.errors import ArtifactError

_RUN = 64  # columns that the bytes of 4-bit weights hold together
_ZERO = 8  # what 4 bits hold of 0


@dataclass(frozen=True, kw_only=True)
class InRows(Node):
    """`input` out of its panels."""

    input: Quantize | QuantizeScales

    def rows(self, data: Data, start: int, stop: int) -> Array:
        first = start // PACK_N
        panels = self.input.rows(data, first, -(-stop // PACK_N))
        if isinstance(self.input, QuantizeScales):
            flat = panels.transpose(0, 2, 1)
        elif self.input.bits == 8:
            flat = panels.transpose(0, 2, 1, 3)
        else:
            flat = panels.transpose(0, 2, 1)
        lines = flat.reshape(len(panels) * PACK_N, -1)[start - first * PACK_N : stop - first * PACK_N]
        if isinstance(self.input, Quantize) and self.input.bits == 4:
            return _halves(lines, self.input.input.shape[1])
        return lines[:, : self.shape[1]]


def _halves(pairs: Array, k: int) -> Array:
    """uint8 [rows, columns / 2], neighbours in a byte, the even column low -> columns 32 apart in a byte."""
    bytes_ = pairs.view(np.uint8)
    columns = np.full((len(bytes_), -(-k // _RUN) * _RUN), _ZERO, dtype=np.uint8)
    columns[:, :k] = np.stack([bytes_ & 15, bytes_ >> 4], axis=2).reshape(len(bytes_), -1)[:, :k]
    runs = columns.reshape(len(bytes_), -1, 2, _RUN // 2)
    return (runs[:, :, 0] | runs[:, :, 1] << 4).astype(NUMPY["uint8"]).reshape(len(bytes_), -1)


def row_node(child: Node) -> InRows:
    """The node of an `in_rows`.

    Raises:
        ArtifactError: what it reads is nothing quantised.
    """
    if not isinstance(child, Quantize | QuantizeScales):
        raise ArtifactError("a recipe's in_rows reads something else than a quantize or quantize_scales; compile again")
    n, k = child.input.shape
    if isinstance(child, QuantizeScales):
        columns = child.shape[1]
    else:
        columns = k if child.bits == 8 else -(-k // _RUN) * (_RUN // 2)
    return InRows(child.dtype, (n, columns), input=child)
