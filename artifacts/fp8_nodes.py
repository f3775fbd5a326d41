"""Matrices of float8_e4m3fn with a scale per row, as a GPU's kernels read them: recipe ops quantize_fp8 and quantize_fp8_scales.

For each row of W [N, K], everything in float32:
    scale = the smallest value of W's dtype that is not below max |w| / 448
    q     = w / scale, to the nearest of float8_e4m3fn, ties to even; 0 where the scale is 0
What W is afterwards is q * scale, rounded once to W's dtype. A NaN or an infinity in W is refused. The results are q [N, K] and the
scales [N, 1] in W's dtype. Rows that a checkpoint holds in this form (stored_nodes.py, fp8_rows) are taken as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.artifacts import float8
from llmc.artifacts.casts import cast
from llmc.artifacts.dtypes import FLOATS, NUMPY, Array
from llmc.artifacts.quantize_nodes import group_scales
from llmc.artifacts.recipe_nodes import Data, Node
from llmc.artifacts.stored_nodes import stored_leaves, stored_rows
from llmc.errors import ArtifactError

_RUN_ELEMENTS = 1 << 19  # of W, widened to float32 at once


@dataclass(frozen=True, kw_only=True)
class QuantizeFp8(Node):
    """`input` [N, K] as fp8, or the scales that belong to it. stored: its rows are fp8 of the checkpoint."""

    input: Node
    scales: bool
    stored: bool

    def rows(self, data: Data, start: int, stop: int) -> Array:
        k = self.input.shape[1]
        if self.stored:
            return stored_rows(self.input, data, k, start, stop, scales=self.scales)
        result = np.empty((stop - start, self.shape[1]), dtype=NUMPY[self.dtype])
        per_run = max(1, _RUN_ELEMENTS // k)
        for first in range(start, stop, per_run):
            last = min(first + per_run, stop)
            wide = cast(self.input.rows(data, first, last), self.input.dtype, "float32").astype(np.float32, copy=False)
            near, scales = group_scales(wide[:, np.newaxis], float8.TOP, self.input.dtype)
            result[first - start : last - start] = near if self.scales else float8.encode(_divided(wide, scales))
        return result


def _divided(wide: float8.Wide, scales: float8.Wide) -> float8.Wide:
    """Rows [N, K] by their scales [N, 1], in float32; those whose scale is 0 are 0 themselves."""
    return np.divide(wide, np.where(scales == 0, np.float32(1), scales), dtype=np.float32)


def fp8_node(op: str, child: Node) -> QuantizeFp8:
    """The node of a `quantize_fp8` or `quantize_fp8_scales`.

    Raises:
        ArtifactError: what it reads is no matrix of floats.
    """
    if child.dtype not in FLOATS or len(child.shape) != 2 or 0 in child.shape:
        raise ArtifactError(f"a recipe's {op} of {child.dtype} {list(child.shape)}; quantised are [N, K] of {', '.join(FLOATS)}")
    scales, stored = op == "quantize_fp8_scales", stored_leaves(child, fp8=True) is not None
    dtype, shape = (child.dtype, (child.shape[0], 1)) if scales else (float8.NAME, child.shape)
    return QuantizeFp8(dtype, shape, input=child, scales=scales, stored=stored)
