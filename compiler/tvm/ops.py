"""How each op of a graph is said in Relax. One function per op; the table at the end is what `--backend tvm` takes."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import relax

from llmc.compiler.tvm.rms_norm import rms_norm
from llmc.errors import UnsupportedModel

if TYPE_CHECKING:
    from llmc.compiler.tvm.relax_graph import Conversion

Convert = Callable[["Conversion", Node], Any]
R = relax.op

_BOUNDS = "clip"  # positions come from the scheduler and token ids are checked; one outside must still not read outside


def _val(node: Any) -> Any:
    return node.meta["val"]


def _args(node: Node) -> tuple[Any, ...]:
    return node.args


def _axis(axis: int, value: torch.Tensor) -> int:
    return axis % value.dim()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse(node: Node, what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"--backend tvm: {node.target} with {what} (node {node.name}) has no converter; compile with --backend inductor"
    )


def convert(made: Conversion, node: Node, name: str) -> Any:
    """What a node becomes; its op, `name`, is one of CONVERTERS.

    Raises:
        UnsupportedModel: a use of the op that has no converter.
    """
    unknown = sorted(set(node.kwargs) - KEYWORDS.get(name, frozenset()))
    if unknown:
        raise _refuse(node, f"keyword {', '.join(unknown)}")
    return CONVERTERS[name](made, node)


def _binary(op: Callable[[Any, Any], Any]) -> Convert:
    def convert(made: Conversion, node: Node) -> Any:
        dtype = _val(node).dtype
        return made.emit(op(*(_operand(made, argument, dtype) for argument in _args(node))))

    return convert


def _operand(made: Conversion, argument: Any, dtype: torch.dtype) -> Any:
    """A tensor in the result's dtype, as torch promotes it; or a number."""
    if not isinstance(argument, Node):
        return relax.const(argument, _name(dtype))
    value = made.get(argument)
    return value if _val(argument).dtype == dtype else made.emit(R.astype(value, _name(dtype)))


def _unary(op: Callable[[Any], Any]) -> Convert:
    return lambda made, node: made.emit(op(made.get(_args(node)[0])))


def _wide(op: Callable[[Any], Any]) -> Convert:
    """A function of one value in fp32, rounded once, as torch computes it."""

    def convert(made: Conversion, node: Node) -> Any:
        wide = made.emit(R.astype(made.get(_args(node)[0]), "float32"))
        return made.emit(R.astype(made.emit(op(wide)), _name(_val(node).dtype)))

    return convert


def _silu_of(x: Any) -> Any:
    return R.multiply(x, R.sigmoid(x))


def _gelu(made: Conversion, node: Node) -> Any:
    approximate = (*_args(node), node.kwargs.get("approximate", "none"))[1]
    return _wide(_gelu_of(approximate == "tanh"))(made, node)


def _gelu_of(tanh: bool) -> Callable[[Any], Any]:
    return R.nn.gelu_tanh if tanh else R.nn.gelu


def _layer_norm(made: Conversion, node: Node) -> Any:
    """In fp32, rounded once."""
    x, shape, weight, bias, eps = (*_args(node), None, None, 1e-5)[:5] if len(_args(node)) < 5 else _args(node)[:5]
    if weight is None or bias is None or len(shape) != 1:
        raise _refuse(node, "no weight, no bias or several dimensions")
    wide, scale, shift = (made.emit(R.astype(made.get(part), "float32")) for part in (x, weight, bias))
    normed = made.emit(R.nn.layer_norm(wide, scale, shift, axes=[-1], epsilon=eps))
    return made.emit(R.astype(normed, _name(_val(node).dtype)))


def _pow(made: Conversion, node: Node) -> Any:
    exponent = _args(node)[1]
    if exponent not in (2, 3):
        raise _refuse(node, f"exponent {exponent}")
    x = made.get(_args(node)[0])
    square = made.emit(R.multiply(x, x))
    return square if exponent == 2 else made.emit(R.multiply(square, x))


def _mean(made: Conversion, node: Node) -> Any:
    x, axes, keep = (*_args(node), node.kwargs.get("keepdim", False))[:3]
    if _val(x).dtype != torch.float32:
        raise _refuse(node, f"{_val(x).dtype}")
    return made.emit(R.mean(made.get(x), axis=list(axes), keepdims=keep))


def _to_dtype(made: Conversion, node: Node) -> Any:
    return made.emit(R.astype(made.get(_args(node)[0]), _name(_val(node).dtype)))


def _transpose(made: Conversion, node: Node) -> Any:
    value = _val(node)
    axes = list(range(value.dim()))
    first, second = (_axis(axis, value) for axis in _args(node)[1:])
    axes[first], axes[second] = axes[second], axes[first]
    return made.emit(R.permute_dims(made.get(_args(node)[0]), axes))


def _reshape(made: Conversion, node: Node) -> Any:
    """Any change of shape that keeps the elements in order; the sizes are those of the result."""
    return made.emit(R.reshape(made.get(_args(node)[0]), made.shape(_val(node).shape)))


def _slice(made: Conversion, node: Node) -> Any:
    source, value = _args(node)[0], _val(node)
    given = dict(zip(("dim", "start", "end", "step"), _args(node)[1:], strict=False))
    axis, begin, step = _axis(given.get("dim", 0), value), given.get("start") or 0, given.get("step", 1)
    extent, length = _val(source).shape[axis], value.shape[axis]
    if not all(isinstance(size, int) for size in (extent, begin, length, step)):
        raise _refuse(node, "an open size")
    begin += extent if begin < 0 else 0
    return _part(made, made.get(source), axis, begin, begin + (length - 1) * step + 1, step)


def _part(made: Conversion, value: Any, axis: int, begin: int, end: int, step: int = 1) -> Any:
    return made.emit(R.strided_slice(value, axes=[axis], begin=[begin], end=[end], strides=[step]))


def _split(made: Conversion, node: Node) -> Any:
    """split and chunk: how long each part is, its own size says."""
    source, _, dim = (*_args(node), 0)[:3]
    axis = _axis(dim, _val(source))
    sizes = [part.shape[axis] for part in _val(node)]
    if not all(isinstance(size, int) for size in sizes):
        raise _refuse(node, "an open size")
    value, ends = made.get(source), list(itertools.accumulate(sizes))
    return [_part(made, value, axis, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _select(made: Conversion, node: Node) -> Any:
    source, axis, index = _args(node)
    if not isinstance(index, int) or index < 0:
        raise _refuse(node, f"index {index}")
    axis = _axis(axis, _val(source))
    if _val(source).shape[axis] == 1:
        return _reshape(made, node)
    part = _part(made, made.get(source), axis, index, index + 1)
    return made.emit(R.squeeze(part, [axis]))


def _cat(made: Conversion, node: Node) -> Any:
    parts, dim = (*_args(node), 0)[:2]
    return made.emit(R.concat(made.get(parts), axis=_axis(dim, _val(node))))


def _stack(made: Conversion, node: Node) -> Any:
    parts, dim = (*_args(node), 0)[:2]
    axis = _axis(dim, _val(node))
    return made.emit(R.concat([made.emit(R.expand_dims(part, axis)) for part in made.get(parts)], axis=axis))


def _index(made: Conversion, node: Node) -> Any:
    """x[:, ids] and the like: one dimension by a vector of positions."""
    indices = list(_args(node)[1])
    given = [axis for axis, ids in enumerate(indices) if ids is not None]
    if len(given) != 1 or _val(indices[given[0]]).dim() != 1 or _val(indices[given[0]]).dtype is torch.bool:
        raise _refuse(node, "more than one vector of positions")
    return made.emit(R.take(made.get(_args(node)[0]), made.get(indices[given[0]]), axis=given[0], mode=_BOUNDS))


def _index_select(made: Conversion, node: Node) -> Any:
    source, axis, ids = _args(node)
    return made.emit(R.take(made.get(source), made.get(ids), axis=_axis(axis, _val(source)), mode=_BOUNDS))


def _embedding(made: Conversion, node: Node) -> Any:
    table, ids = _args(node)[:2]  # what may follow says how gradients are made
    return made.emit(R.take(made.get(table), made.get(ids), axis=0, mode=_BOUNDS))


def _getitem(made: Conversion, node: Node) -> Any:
    return made.get(_args(node)[0])[_args(node)[1]]


def _sym_size(made: Conversion, node: Node) -> Any:
    """Sizes are read off the results' own shapes; nobody asks for this value."""
    return None


def _rms_norm(made: Conversion, node: Node) -> Any:
    x, weight, eps, offset, round_first = _args(node)
    return rms_norm(made.builder, made.get(x), made.get(weight), eps, offset, round_first)


def _add_rms_norm(made: Conversion, node: Node) -> Any:
    x, residual, weight, eps, offset, round_first = _args(node)
    total = made.emit(R.add(made.get(x), made.get(residual)))
    return [rms_norm(made.builder, total, made.get(weight), eps, offset, round_first), total]


def _gated(made: Conversion, node: Node) -> Any:
    """silu_mul and gelu_mul: in fp32, rounded once."""
    gate, up = (made.emit(R.astype(made.get(argument), "float32")) for argument in _args(node)[:2])
    active = made.emit(_gelu_of(_args(node)[2])(gate) if len(_args(node)) > 2 else _silu_of(gate))
    return made.emit(R.astype(made.emit(R.multiply(active, up)), _name(_val(node).dtype)))


def _linear(made: Conversion, node: Node) -> Any:
    x, weight, bias, _ = _args(node)
    given = [made.get(x), made.get(weight), *([made.get(bias)] if bias is not None else [])]
    return made.extern("linear_bias" if bias is not None else "linear", given, _val(node))


def _packed_embedding(made: Conversion, node: Node) -> Any:
    ids, weight, _ = _args(node)
    return made.extern("embedding", [made.get(ids), made.get(weight)], _val(node))


def _paged_attention(made: Conversion, node: Node) -> Any:
    *tensors, _layer, group, scale, window, softcap, sinks = _args(node)
    if sinks is not None:
        raise _refuse(node, "sinks")
    numbers = [group, _bits(scale), window, _bits(softcap)]
    return made.extern("paged_attention", [*(made.get(tensor) for tensor in tensors), *numbers], _val(node))


def _bits(number: float) -> int:
    """A float as the integer of its bits: bytecode holds integers, and makes a float by a call each time."""
    return int.from_bytes(struct.pack("<d", number), "little", signed=True)


# Keywords that a converter reads; an op with another is refused.
KEYWORDS = {
    "aten._to_copy.default": frozenset({"dtype"}),
    "aten.gelu.default": frozenset({"approximate"}),
    "aten.mean.dim": frozenset({"keepdim"}),
}

# Ops that change a shape and leave the elements in their order, where the axis they take away is of size 1.
VIEWS = frozenset({"aten.reshape.default", "aten.select.int", "aten.squeeze.dim", "aten.unsqueeze.default", "aten.view.default"})

CONVERTERS: dict[str, Convert] = {
    "aten._to_copy.default": _to_dtype,
    "aten.add.Tensor": _binary(R.add),
    "aten.cat.default": _cat,
    "aten.chunk.default": _split,
    "aten.div.Tensor": _binary(R.divide),
    "aten.embedding.default": _embedding,
    "aten.flatten.using_ints": _reshape,
    "aten.gelu.default": _gelu,
    "aten.index.Tensor": _index,
    "aten.index_select.default": _index_select,
    "aten.layer_norm.default": _layer_norm,
    "aten.mean.dim": _mean,
    "aten.mul.Tensor": _binary(R.multiply),
    "aten.neg.default": _unary(R.negative),
    "aten.pow.Tensor_Scalar": _pow,
    "aten.relu.default": _unary(R.nn.relu),
    "aten.reshape.default": _reshape,
    "aten.rsqrt.default": _unary(R.rsqrt),
    "aten.select.int": _select,
    "aten.sigmoid.default": _wide(R.sigmoid),
    "aten.silu.default": _wide(_silu_of),
    "aten.slice.Tensor": _slice,
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split,
    "aten.squeeze.dim": _reshape,
    "aten.stack.default": _stack,
    "aten.sub.Tensor": _binary(R.subtract),
    "aten.sym_size.int": _sym_size,
    "aten.tanh.default": _wide(R.tanh),
    "aten.to.dtype": _to_dtype,
    "aten.transpose.int": _transpose,
    "aten.unsqueeze.default": _reshape,
    "aten.view.default": _reshape,
    "getitem": _getitem,
    "llmc.add_rms_norm.default": _add_rms_norm,
    "llmc.embedding.default": _packed_embedding,
    "llmc.gelu_mul.default": _gated,
    "llmc.linear.default": _linear,
    "llmc.paged_attention.default": _paged_attention,
    "llmc.rms_norm.default": _rms_norm,
    "llmc.silu_mul.default": _gated,
}
