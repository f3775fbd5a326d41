"""DeviceBatch -> the bytes of a plan's inputs, filled up to the plan's sizes, in one piece that one copy takes to the GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from llmc.artifacts.dtypes import NUMPY
from llmc.artifacts.element_sizes import nbytes_of
from llmc.artifacts.manifest import TensorSpec
from llmc.artifacts.plan import Plan
from llmc.artifacts.plan_check import REGION_ALIGNMENT
from llmc.errors import ArtifactError
from llmc.runtime.memory import round_up
from llmc.runtime.step import DeviceBatch

INPUTS = ("input_ids", "positions", "logits_indices", "slot_mapping", "block_tables", "seq_lens", "query_start_loc")


def fixed_shape(shape: Sequence[int | str], sizes: Mapping[str, int], where: str) -> list[int]:
    """A `TensorSpec`'s shape at a plan's sizes: ["B + 1"] with B = 8 is [9].

    Raises:
        ArtifactError: a symbol has no size.
    """
    fixed = []
    for dim in shape:
        symbol, _, added = (dim, "", "") if isinstance(dim, int) else dim.partition(" + ")
        if isinstance(symbol, str) and (symbol not in sizes or not (added or "0").isdecimal()):
            raise ArtifactError(f"{where}: dimension {dim!r} has no size in the plan; compile again")
        fixed.append(symbol if isinstance(symbol, int) else sizes[symbol] + int(added or 0))
    return fixed


class InputLayout:
    """Where each input of a plan lies in its piece, at a multiple of REGION_ALIGNMENT.

    Attributes:
        offsets: input name -> bytes from the start. nbytes: of the whole piece.

    Raises:
        ArtifactError: an input that this runtime does not have, or of another size than the manifest says.
    """

    def __init__(self, plan: Plan, specs: Sequence[TensorSpec], where: str) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._shapes: dict[str, list[int]] = {}
        self.offsets: dict[str, int] = {}
        self.nbytes = 0
        for region in plan.regions:
            if region.kind != "input":
                continue
            if region.name not in INPUTS or region.name not in self._specs:
                raise ArtifactError(f"{where}: this runtime has no input {region.name[:200]!r}; upgrade llmc or compile again")
            spec = self._specs[region.name]
            shape = fixed_shape(spec.shape, plan.sizes, where)
            nbytes = nbytes_of(spec.dtype, shape)
            if region.size_bytes != nbytes:
                raise ArtifactError(
                    f"{where}: input {region.name} has {region.size_bytes} bytes, {spec.dtype} {shape} needs {nbytes}; compile again"
                )
            self._shapes[region.name] = shape
            self.offsets[region.name] = self.nbytes
            self.nbytes = round_up(self.nbytes + nbytes, REGION_ALIGNMENT)

    def on(self, piece: np.ndarray) -> StagedInputs:
        """The inputs as arrays over a piece of memory, uint8 [at least nbytes]."""
        arrays = {}
        for name, offset in self.offsets.items():
            dtype = NUMPY[self._specs[name].dtype]
            end = offset + nbytes_of(self._specs[name].dtype, self._shapes[name])
            arrays[name] = piece[offset:end].view(dtype).reshape(self._shapes[name])
        return StagedInputs(arrays)


class StagedInputs:
    """Arrays over staging memory. `write` overwrites them; the memory must not be in use by a copy."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays

    def write(self, batch: DeviceBatch, rows: slice) -> None:
        """Lay out a step that fits; of its logits only `rows`, the first of which becomes row 0.

        Filled up with tokens 0 at position 0 in slot -1, sequences without tokens, and rows that ask for token 0.
        """
        tokens, sequences, columns = len(batch.input_ids), len(batch.seq_lens), batch.block_tables.shape[2]
        for name, array in self._arrays.items():
            if name == "slot_mapping":
                array[:, :tokens] = batch.slot_mapping
                array[:, tokens:] = -1
            elif name == "block_tables":
                array[:, :sequences, :columns] = batch.block_tables
                array[:, :sequences, columns:] = 0
                array[:, sequences:] = 0
            elif name == "query_start_loc":
                array[: sequences + 1] = batch.query_start_loc
                array[sequences + 1 :] = tokens
            else:
                given: np.ndarray = getattr(batch, name)
                given = given[rows] if name == "logits_indices" else given
                array[: len(given)] = given
                array[len(given) :] = 0
