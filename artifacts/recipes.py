"""Weights as recipes: a packed tensor is a small expression over named checkpoint tensors, evaluated in row blocks.

A recipe is JSON, a tree of
    {"op": "source", "name": N}                          a checkpoint tensor; with "shape": [..] only one of that shape
    {"op": "computed", "key": K}                         a tensor made at compile time (rope tables)
    {"op": "literal", "dtype": D, "shape": [..], "data": HEX}    a few bytes, little-endian
    {"op": "cast", "dtype": D, "input": R}               between float32, float16, bfloat16; nearest even
    {"op": "concat", "axis": A, "inputs": [R, ..]}       equal in every other dimension
    {"op": "stack", "inputs": [R, ..]}                   a new first dimension
    {"op": "slice", "axis": A, "start": I, "stop": J, "input": R}
    {"op": "transpose", "axes": [..], "input": R}        axes as numpy.transpose takes them
    {"op": "reshape", "shape": [..], "input": R}
    {"op": "pack", "input": R}                           [.., N, K] into the kernels' layout, zero padded
    {"op": "quantize", "bits": B, "group": G, "input": R}          [N, K] as packed integers (quantize_nodes.py)
    {"op": "quantize_scales", "bits": B, "group": G, "input": R}   and the scales that belong to them
    {"op": "in_rows", "input": R}                        a quantize or quantize_scales out of its panels, for GPUs (row_nodes.py)
    {"op": "quantize_fp8", "input": R}                   [N, K] as float8_e4m3fn (fp8_nodes.py)
    {"op": "quantize_fp8_scales", "input": R}            and the scales of its rows
    {"op": "dequantize", "form": F, ..., "inputs": [R, ..]}        [N, K] from a checkpoint's own integers (stored_nodes.py)

`infer` checks a recipe and gives its dtype and shape without touching data. `blocks` gives the result row block by row block:
a pack of a concat of casts holds one block of each at a time, so its peak is a few megabytes, not the tensor.
A transpose that moves the first dimension, or a reshape, needs its whole input; over a mapped checkpoint these are views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from llmc.artifacts.dtypes import FLOATS, NUMPY, Array
from llmc.artifacts.element_sizes import nbytes_of
from llmc.artifacts.fp8_nodes import fp8_node
from llmc.artifacts.quantize_nodes import quantizing_node
from llmc.artifacts.recipe_nodes import Cast, Concat, Literal, Node, Pack, Reshape, Slice, Source, Stack, Transpose
from llmc.artifacts.row_nodes import row_node
from llmc.artifacts.stored_nodes import dequantizing_node
from llmc.errors import ArtifactError

Recipe = Mapping[str, Any]
Spec = tuple[str, tuple[int, ...]]  # dtype and shape

MAX_DEPTH = 32
MAX_NODES = 100_000  # 256 experts of three parts each stay far below
MAX_LITERAL_BYTES = 1 << 20
BLOCK_BYTES = 8 << 20  # of the result, per block
_MAX_ELEMENTS = 1 << 40

_FIELDS: dict[str, set[str]] = {
    "source": {"name"},  # and perhaps "shape"
    "computed": {"key"},
    "literal": {"dtype", "shape", "data"},
    "cast": {"dtype", "input"},
    "concat": {"axis", "inputs"},
    "stack": {"inputs"},
    "slice": {"axis", "start", "stop", "input"},
    "transpose": {"axes", "input"},
    "reshape": {"shape", "input"},
    "pack": {"input"},
    "quantize": {"bits", "group", "input"},
    "quantize_scales": {"bits", "group", "input"},
    "in_rows": {"input"},
    "quantize_fp8": {"input"},
    "quantize_fp8_scales": {"input"},
    "dequantize": {"form", "bits", "group", "symmetric", "dtype", "shape", "inputs"},
}


def sources(recipe: Recipe) -> set[str]:
    """The checkpoint tensors a recipe reads."""
    return {str(node["name"]) for node in _walk(recipe) if node["op"] == "source"}


def with_shapes(recipe: Recipe, specs: Mapping[str, Spec]) -> Recipe:
    """A copy that takes checkpoint tensors of the shapes in `specs` alone. Packed shapes are padded, and cannot tell 500 rows from 512."""
    if recipe["op"] == "source":
        return {**recipe, "shape": list(specs[recipe["name"]][1])}
    if "input" in recipe:
        return {**recipe, "input": with_shapes(recipe["input"], specs)}
    if "inputs" in recipe:
        return {**recipe, "inputs": [with_shapes(child, specs) for child in recipe["inputs"]]}
    return recipe


def infer(recipe: Recipe, specs: Mapping[str, Spec], computed: Mapping[str, Spec] | None = None) -> Spec:
    """Check a recipe and find the dtype and shape of its result; no data is read.

    Args:
        recipe: foreign input, believed in nothing.
        specs: checkpoint tensors by name (`Checkpoint.specs()`).
        computed: tensors made at compile time, by key.

    Raises:
        ArtifactError: an unknown op or field, too deep or too large, a missing tensor, or shapes that do not fit.
    """
    node = _build(recipe, specs, computed or {})
    return node.dtype, node.shape


def blocks(
    recipe: Recipe,
    fetch: Callable[[str], Array],
    specs: Mapping[str, Spec],
    computed: Mapping[str, tuple[str, Array]] | None = None,
    *,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[Array]:
    """Evaluate a recipe, giving the result as consecutive C-contiguous runs of its first dimension.

    Args:
        recipe: checked by this call, before the first block.
        fetch: gives a checkpoint tensor; best a view of a mapped file. Called once per block that needs it.
        specs: dtype and shape of the checkpoint's tensors.
        computed: key -> (dtype, values).
        block_bytes: about the size of a block; one row at least.

    Raises:
        ArtifactError: as `infer`, or `fetch` gave something else than `specs` says.
    """
    made = computed or {}
    node = _build(recipe, specs, {key: (dtype, values.shape) for key, (dtype, values) in made.items()})
    data = _Data(fetch, specs, made)
    if not node.shape:
        yield np.ascontiguousarray(node.whole(data))
        return
    step = max(1, block_bytes // max(1, nbytes_of(node.dtype, node.shape[1:])))
    for start in range(0, node.shape[0], step):
        yield np.ascontiguousarray(node.rows(data, start, min(start + step, node.shape[0])))


def evaluate(
    recipe: Recipe, fetch: Callable[[str], Array], specs: Mapping[str, Spec], computed: Mapping[str, tuple[str, Array]] | None = None
) -> Array:
    """Evaluate a recipe into one new array (bf16 as uint16)."""
    dtype, shape = infer(recipe, specs, {key: (d, v.shape) for key, (d, v) in (computed or {}).items()})
    result = np.empty(shape, dtype=NUMPY[dtype])
    evaluate_into(recipe, result.reshape(-1).view(np.uint8), fetch, specs, computed)
    return result


def evaluate_into(
    recipe: Recipe,
    target: Array,
    fetch: Callable[[str], Array],
    specs: Mapping[str, Spec],
    computed: Mapping[str, tuple[str, Array]] | None = None,
) -> None:
    """Evaluate a recipe into memory that is there already.

    Args:
        target: uint8 [nbytes], written in row order; exactly the result's size.
    """
    done = 0
    for block in blocks(recipe, fetch, specs, computed):
        flat = block.reshape(-1).view(np.uint8)
        if done + flat.size > target.size:
            raise ArtifactError(f"a recipe gives more than the {target.size} bytes its tensor has; compile again")
        target[done : done + flat.size] = flat
        done += flat.size
    if done != target.size:
        raise ArtifactError(f"a recipe gives {done} bytes, its tensor has {target.size}; compile again")


class _Data:
    """Where leaves find their values, checked against what was promised."""

    def __init__(self, fetch: Callable[[str], Array], specs: Mapping[str, Spec], computed: Mapping[str, tuple[str, Array]]) -> None:
        self._fetch = fetch
        self._specs = specs
        self._computed = computed

    def source(self, name: str) -> Array:
        dtype, shape = self._specs[name]
        values = self._fetch(name)
        if values.dtype != NUMPY[dtype] or values.shape != tuple(shape):
            raise ArtifactError(f"checkpoint tensor {name!r} is {values.dtype} {list(values.shape)}, expected {dtype} {list(shape)}")
        return values

    def computed(self, key: str) -> Array:
        dtype, values = self._computed[key]
        if values.dtype != NUMPY[dtype]:
            raise ArtifactError(f"computed tensor {key!r} is {values.dtype}, expected {NUMPY[dtype]} for {dtype}")
        return values


def _walk(recipe: Recipe) -> Iterator[Recipe]:
    """Every node, checked for op, fields and limits; no recursion, so that depth cannot hurt."""
    pending: list[tuple[Any, int]] = [(recipe, 1)]
    count = 0
    while pending:
        node, depth = pending.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_NODES:
            raise ArtifactError(f"a recipe is deeper than {MAX_DEPTH} or larger than {MAX_NODES} nodes; compile again")
        if not isinstance(node, Mapping) or not isinstance(node.get("op"), str) or node["op"] not in _FIELDS:
            raise ArtifactError(f"a recipe holds {str(node)[:100]!r}, expected an object with op out of {', '.join(_FIELDS)}")
        if set(node) - ({"shape"} if node["op"] == "source" else set()) != _FIELDS[node["op"]] | {"op"}:
            raise ArtifactError(
                f"a recipe's {node['op']} has the fields {sorted(node)[:10]}, expected {sorted(_FIELDS[node['op']] | {'op'})}"
            )
        yield node
        if "input" in node:
            pending.append((node["input"], depth + 1))
        inputs = node.get("inputs", [])
        if not isinstance(inputs, list) or ("inputs" in node and not inputs):
            raise ArtifactError(f"a recipe's {node['op']} needs a list of at least one input")
        pending.extend((child, depth + 1) for child in reversed(inputs))


def _build(recipe: Recipe, specs: Mapping[str, Spec], computed: Mapping[str, Spec]) -> Node:
    for _ in _walk(recipe):
        pass  # bounds the tree before the recursion below
    node = _node(recipe, specs, computed)
    return node


def _node(recipe: Recipe, specs: Mapping[str, Spec], computed: Mapping[str, Spec]) -> Node:
    op = recipe["op"]
    if op in ("source", "computed"):
        name, table = (recipe["name"], specs) if op == "source" else (recipe["key"], computed)
        if not isinstance(name, str) or name not in table:
            kind = "the checkpoint holds no tensor" if op == "source" else "there is no computed tensor"
            raise ArtifactError(f"{kind} {str(name)[:200]!r} that a recipe needs; it belongs to another model or is incomplete")
        dtype, shape = table[name]
        if op == "source" and recipe.get("shape", list(shape)) != list(shape):
            raise ArtifactError(
                f"the checkpoint's {name[:200]} has the shape {list(shape)}, a recipe needs {str(recipe['shape'])[:100]}; "
                "it belongs to another model"
            )
        return Source(dtype, tuple(shape), name=name, is_computed=op == "computed")
    if op == "literal":
        return _literal(recipe)
    if op == "dequantize":
        return dequantizing_node(recipe, [_node(child, specs, computed) for child in recipe["inputs"]])
    if op in ("concat", "stack"):
        inputs = [_node(child, specs, computed) for child in recipe["inputs"]]
        return _joined(op, recipe, inputs)
    return _unary(recipe, _node(recipe["input"], specs, computed))


def _literal(recipe: Recipe) -> Node:
    dtype, shape, data = recipe["dtype"], recipe["shape"], recipe["data"]
    if dtype not in NUMPY or not _are_sizes(shape) or not isinstance(data, str) or len(data) > 2 * MAX_LITERAL_BYTES:
        raise ArtifactError(f"a recipe's literal needs a dtype, a shape and at most {MAX_LITERAL_BYTES} bytes of hex")
    try:
        raw = bytes.fromhex(data)
    except ValueError:
        raise ArtifactError("a recipe's literal is not hex") from None
    if len(raw) != nbytes_of(dtype, shape):
        raise ArtifactError(f"a recipe's literal has {len(raw)} bytes, {dtype} {shape} needs {nbytes_of(dtype, shape)}")
    return Literal(dtype, tuple(shape), values=np.frombuffer(raw, dtype=NUMPY[dtype]).reshape(shape))


def _joined(op: str, recipe: Recipe, inputs: list[Node]) -> Node:
    first = inputs[0]
    if any(child.dtype != first.dtype for child in inputs):
        raise ArtifactError(f"a recipe's {op} mixes the dtypes {', '.join(sorted({child.dtype for child in inputs}))}")
    if op == "stack":
        if any(child.shape != first.shape for child in inputs):
            raise ArtifactError(f"a recipe's stack mixes the shapes {_shapes(inputs)}")
        return Stack(first.dtype, (len(inputs), *first.shape), inputs=inputs)
    axis = _axis(recipe["axis"], first, "concat")
    if any(_without(child.shape, axis) != _without(first.shape, axis) or len(child.shape) != len(first.shape) for child in inputs):
        raise ArtifactError(f"a recipe's concat along axis {axis} mixes the shapes {_shapes(inputs)}")
    shape = (*first.shape[:axis], sum(child.shape[axis] for child in inputs), *first.shape[axis + 1 :])
    return Concat(first.dtype, shape, inputs=inputs, axis=axis)


def _unary(recipe: Recipe, child: Node) -> Node:
    op = recipe["op"]
    if op == "cast":
        target = recipe["dtype"]
        if target != child.dtype and not (target in FLOATS and child.dtype in FLOATS):
            raise ArtifactError(f"a recipe casts {child.dtype} to {str(target)[:50]}; casts go between {', '.join(FLOATS)}")
        return Cast(target, child.shape, input=child)
    if op == "slice":
        axis, start, stop = _axis(recipe["axis"], child, "slice"), recipe["start"], recipe["stop"]
        if not _are_sizes([start, stop]) or not start <= stop <= child.shape[axis]:
            raise ArtifactError(f"a recipe slices {start}:{stop} out of axis {axis} of {list(child.shape)}")
        return Slice(child.dtype, (*child.shape[:axis], stop - start, *child.shape[axis + 1 :]), input=child, axis=axis, start=start)
    if op == "transpose":
        axes = recipe["axes"]
        if not _are_sizes(axes) or sorted(axes) != list(range(len(child.shape))):
            raise ArtifactError(f"a recipe transposes {list(child.shape)} by {str(axes)[:100]}, expected each axis once")
        return Transpose(child.dtype, tuple(child.shape[a] for a in axes), input=child, axes=tuple(axes))
    if op == "reshape":
        shape = recipe["shape"]
        if not _are_sizes(shape) or nbytes_of(child.dtype, shape) != nbytes_of(child.dtype, child.shape):
            raise ArtifactError(f"a recipe reshapes {list(child.shape)} to {str(shape)[:100]}, which has another number of elements")
        return Reshape(child.dtype, tuple(shape), input=child)
    if op in ("quantize", "quantize_scales"):
        return quantizing_node(op, recipe["bits"], recipe["group"], child)
    if op in ("quantize_fp8", "quantize_fp8_scales"):
        return fp8_node(op, child)
    if op == "in_rows":
        return row_node(child)
    if child.dtype not in FLOATS or len(child.shape) < 2 or 0 in child.shape:
        raise ArtifactError(f"a recipe packs {child.dtype} {list(child.shape)}; packed are [.., N, K] of {', '.join(FLOATS)}")
    return Pack(child.dtype, Pack.packed_shape(child.dtype, child.shape), input=child)


def _axis(axis: Any, child: Node, op: str) -> int:
    if type(axis) is not int or not 0 <= axis < len(child.shape):
        raise ArtifactError(f"a recipe's {op} along axis {str(axis)[:50]} of {list(child.shape)}; expected 0 to {len(child.shape) - 1}")
    return axis


def _are_sizes(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) > 16 or not all(type(item) is int and item >= 0 for item in value):
        return False
    product = 1
    for item in value:
        product *= max(item, 1)
    return product <= _MAX_ELEMENTS


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _shapes(inputs: list[Node]) -> str:
    return ", ".join(sorted({str(list(child.shape)) for child in inputs})[:5])
