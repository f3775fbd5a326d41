"""The constants of a graph, as recipes: no pass ever touches a weight's bytes.

A graph reads a constant through a `get_attr` node whose target is a name in the `WeightTable`. The entry says how the constant
is made from named checkpoint tensors (the recipe, plain JSON), and its dtype and shape. Recipes are applied when packing, one
tensor at a time. Only small tensors that exist without the checkpoint (rope frequencies, norms' scalars) carry a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import ceil, prod
from typing import Any

import torch

Recipe = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant:
    """One constant of the graph.

    recipe: how packing makes it; JSON of the form described in artifacts/recipes.py.
    value: the tensor itself where it is known at compile time without the checkpoint, else None.
    """

    recipe: Recipe
    dtype: torch.dtype
    shape: tuple[int, ...]
    value: torch.Tensor | None = None

    def __post_init__(self) -> None:
        assert self.value is None or (self.value.dtype == self.dtype and tuple(self.value.shape) == self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.dtype.itemsize * prod(self.shape)


@dataclass(kw_only=True, slots=True)
class WeightTable:
    """Name -> constant. Passes add entries; the runner drops those the graph no longer reads.

    computed: bytes of {"op": "computed", "key": ...} recipes, tensors made by a pass (rope tables), packed by the compile driver.
    """

    constants: dict[str, Constant] = field(default_factory=dict)
    computed: dict[str, torch.Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Constant:
        return self.constants[name]

    def __contains__(self, name: object) -> bool:
        return name in self.constants

    def __iter__(self) -> Iterator[str]:
        return iter(self.constants)

    def __len__(self) -> int:
        return len(self.constants)

    def add(self, name: str, constant: Constant) -> str:
        """Add a constant under `name`, or `name_2`, `name_3`, ... if taken. Returns the name used."""
        unique, number = name, 2
        while unique in self.constants:
            unique, number = f"{name}_{number}", number + 1
        self.constants[unique] = constant
        return unique

    def add_computed(self, name: str, value: torch.Tensor) -> str:
        """Add a tensor that a pass computed; its bytes are held here until packing. Returns the name used."""
        name = self.add(name, Constant(recipe={"op": "computed", "key": name}, dtype=value.dtype, shape=tuple(value.shape), value=value))
        self.constants[name].recipe["key"] = name
        self.computed[name] = value
        return name

    def keep(self, names: Iterable[str]) -> list[str]:
        """Drop every constant not in `names`. Returns the dropped names, in order."""
        wanted = set(names)
        dropped = [name for name in self.constants if name not in wanted]
        for name in dropped:
            del self.constants[name]
            self.computed.pop(name, None)
        return dropped


def concat(inputs: list[Constant], axis: int = 0) -> Constant:
    """The concatenation of constants of one dtype, equal in every other dimension."""
    first = inputs[0]
    shape = list(first.shape)
    shape[axis] = sum(c.shape[axis] for c in inputs)
    assert all(c.dtype == first.dtype and len(c.shape) == len(shape) for c in inputs)
    recipe = {"op": "concat", "axis": axis, "inputs": [c.recipe for c in inputs]}
    return Constant(recipe=recipe, dtype=first.dtype, shape=tuple(shape))


def transpose(constant: Constant, axes: tuple[int, ...]) -> Constant:
    """A constant with its axes permuted; two transposes that undo each other leave the recipe as it was."""
    shape = tuple(constant.shape[a] for a in axes)
    inner = constant.recipe
    if inner["op"] == "transpose" and [inner["axes"][a] for a in axes] == list(range(len(axes))):
        return Constant(recipe=inner["input"], dtype=constant.dtype, shape=shape)
    return Constant(recipe={"op": "transpose", "input": inner, "axes": list(axes)}, dtype=constant.dtype, shape=shape)


def packed_shape(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """Shape of a [..., N, K] weight in the packed layout of docs/architecture.md: 16 columns, pairs along K for 16-bit floats."""
    *lead, n, k = shape
    if dtype == torch.float32:
        return (*lead, ceil(n / 16), k, 16)
    return (*lead, ceil(n / 16), ceil(k / 32) * 16, 16, 2)


def pack(constant: Constant) -> Constant:
    """A [..., N, K] weight in the packed layout, zero padded."""
    recipe = {"op": "pack", "input": constant.recipe}
    return Constant(recipe=recipe, dtype=constant.dtype, shape=packed_shape(constant.shape, constant.dtype))


def quantize(packed: Constant, *, bits: int, group: int, shape: tuple[int, int]) -> Constant:
    """The integers of what `pack` made of a matrix of `shape` [N, K], packed; docs/architecture.md."""
    panels, pairs = ceil(shape[0] / 16), ceil(shape[1] / 32) * 16
    dtype, made = (torch.int8, (panels, pairs, 16, 2)) if bits == 8 else (torch.uint8, (panels, pairs, 16))
    return Constant(recipe=_quantizing("quantize", packed, bits, group), dtype=dtype, shape=made)


def quantize_scales(packed: Constant, *, bits: int, group: int, shape: tuple[int, int]) -> Constant:
    """The scales that belong to the integers of `quantize`."""
    made = (ceil(shape[0] / 16), ceil(shape[1] / group), 16)
    return Constant(recipe=_quantizing("quantize_scales", packed, bits, group), dtype=packed.dtype, shape=made)


def quantize_rows(matrix: Constant, *, bits: int, group: int) -> Constant:
    """The integers of a matrix [N, K] in rows, as GPUs read them; artifacts/row_nodes.py."""
    n, k = matrix.shape
    dtype, columns = (torch.int8, k) if bits == 8 else (torch.uint8, ceil(k / 64) * 32)
    return Constant(recipe=_in_rows("quantize", matrix, bits, group), dtype=dtype, shape=(n, columns))


def quantize_row_scales(matrix: Constant, *, bits: int, group: int) -> Constant:
    """The scales that belong to the integers of `quantize_rows`."""
    n, k = matrix.shape
    return Constant(recipe=_in_rows("quantize_scales", matrix, bits, group), dtype=matrix.dtype, shape=(n, ceil(k / group)))


def fp8_rows(matrix: Constant) -> Constant:
    """A matrix [N, K] as float8_e4m3fn; artifacts/fp8_nodes.py."""
    return Constant(recipe={"op": "quantize_fp8", "input": matrix.recipe}, dtype=torch.float8_e4m3fn, shape=matrix.shape)


def fp8_row_scales(matrix: Constant) -> Constant:
    """The scales that belong to `fp8_rows`, [N, 1]."""
    return Constant(recipe={"op": "quantize_fp8_scales", "input": matrix.recipe}, dtype=matrix.dtype, shape=(matrix.shape[0], 1))


def _in_rows(op: str, matrix: Constant, bits: int, group: int) -> Recipe:
    return {"op": "in_rows", "input": {"op": op, "bits": bits, "group": group, "input": matrix.recipe}}


def _quantizing(op: str, packed: Constant, bits: int, group: int) -> Recipe:
    assert packed.recipe["op"] == "pack", "a packed matrix is quantised from what was packed"
    return {"op": op, "bits": bits, "group": group, "input": packed.recipe["input"]}
