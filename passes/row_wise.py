"""Which rows of an op's inputs a row of its result is made from.

A *row* is one token: one index along a dimension of size T. An op is row-wise if row t of its result depends on row t of its
inputs alone, bit for bit, whatever the other rows hold and however many there are. For linears that is the contract of
`llmc.linear`, which every level above -O0 ends in.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from llmc.passes import graph as G
from llmc.passes.base import Reject

aten = torch.ops.aten

# Carried from input to result element by element, though torch does not tag them pointwise.
_ELEMENTWISE = {
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default, aten.contiguous.default, aten.clone.default,
    aten.alias.default, aten.detach.default, aten._to_copy.default, aten.dropout.default,
}  # fmt: skip
_REDUCTIONS = {aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default}
_ALONG_ONE = {aten.softmax.int: 1, aten._softmax.default: 1, aten.log_softmax.int: 1, aten.slice.Tensor: 1, aten.select.int: 1}
_SPLITS = {aten.split.Tensor: 2, aten.split_with_sizes.default: 2, aten.chunk.default: 2}
_RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints}
SIZED = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default}  # args[1] is the result's shape

Rows = list[tuple[Node, int]]  # inputs that carry rows, with the dimension they lie in


def row_dimension(value: Any, size: Any) -> int | None:
    """The one dimension of a fake tensor whose size is `size`; None if there is none or more than one."""
    found = [i for i, s in enumerate(value.shape) if G.same_size(s, size)]
    return found[0] if len(found) == 1 else None


def row_inputs(node: Node, dim: int) -> Rows | Reject:
    """Where the rows along `dim` of a call's result come from.

    `dim` is counted from the left. Returns the inputs that carry rows, or a Reject if the op is not known to be row-wise.
    Inputs not named carry none: every row reads them whole.
    """
    target = node.target
    if target is operator.getitem:
        return [(G.args_of(node)[0], dim)]
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return _mixes(node)
    first: Any = G.args_of(node)[0] if node.args else None
    if target in _ELEMENTWISE:
        return [(first, dim)]
    if torch.Tag.pointwise in target.tags:
        return _broadcast(node, dim, list(node.all_input_nodes))
    if target in (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default) or G.is_op(node, "llmc.linear.default"):
        return _matmul(node, dim)
    if G.is_op(node, G.LORA_ADD):
        y, x, slots = G.args_of(node)[:3]
        return [(y, dim), (x, dim), (slots, 0)] if dim < _rank(node) - 1 else _mixes(node)
    if target in (aten.layer_norm.default, aten.rms_norm.default):
        return [(first, dim)] if dim < _rank(first) - len(G.args_of(node)[1]) else _mixes(node)
    if target in _REDUCTIONS:
        return _reduction(node, dim)
    if target in _ALONG_ONE:
        return _along_one(node, dim)
    if target in _SPLITS:
        return [(first, dim)] if _positive(G.argument(node, 2, "dim", 0), _rank(first)) != dim else _mixes(node)
    if target is aten.repeat_interleave.self_int:
        along = G.argument(node, 2, "dim")
        return [(first, dim)] if along is not None and _positive(along, _rank(first)) != dim else _mixes(node)
    if target is aten.stack.default:
        new = _positive(G.argument(node, 1, "dim", 0), _rank(node))
        return [(t, dim if dim < new else dim - 1) for t in first] if dim != new else _mixes(node)
    if target is aten.cat.default:
        return [(t, dim) for t in first] if _positive(G.argument(node, 1, "dim", 0), _rank(node)) != dim else _mixes(node)
    return _moved(node, dim)


def _mixes(node: Node) -> Reject:
    return Reject("an op that is not known to be row-wise", str(node.target))


def _rank(node: Any) -> int:
    return len(G.val(node).shape)


def _positive(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _broadcast(node: Node, dim: int, inputs: list[Node]) -> Rows:
    """Inputs aligned at the right; those of size 1 or too short in `dim` are the same for all rows."""
    rank, size = _rank(node), G.val(node).shape[dim]
    rows = []
    for value in inputs:
        if not isinstance(G.val(value), torch.Tensor):
            continue
        at = dim - (rank - _rank(value))
        if at >= 0 and G.same_size(G.val(value).shape[at], size):
            rows.append((value, at))
    return rows


def _matmul(node: Node, dim: int) -> Rows | Reject:
    x, w = (G.args_of(node)[1], G.args_of(node)[2]) if node.target is aten.addmm.default else (G.args_of(node)[0], G.args_of(node)[1])
    if G.is_constant(w) and dim < _rank(node) - 1:
        return [(x, dim)]
    if node.target in (aten.matmul.default, aten.mm.default) and G.val(x).shape[-1] == 1 and _rank(x) == _rank(w):
        # an outer product: every element is one product, so it is as row-wise as a multiplication
        rank = _rank(node)
        rows = [(x, dim)] if dim != rank - 1 and G.same_size(G.val(x).shape[dim], G.val(node).shape[dim]) else []
        rows += [(w, dim)] if dim != rank - 2 and G.same_size(G.val(w).shape[dim], G.val(node).shape[dim]) else []
        return rows
    return _mixes(node)


def _reduction(node: Node, dim: int) -> Rows | Reject:
    x, reduced = G.args_of(node)[0], G.argument(node, 1, "dim")
    if not reduced:
        return _mixes(node)
    reduced = {_positive(d, _rank(x)) for d in reduced}
    if _rank(node) != _rank(x):
        kept = [d for d in range(_rank(x)) if d not in reduced]
        return [(x, kept[dim])]
    return [(x, dim)] if dim not in reduced else _mixes(node)


def _along_one(node: Node, dim: int) -> Rows | Reject:
    x = G.args_of(node)[0]
    along = _positive(G.argument(node, 1, "dim", 0), _rank(x))
    if node.target is aten.select.int:
        return [(x, dim if dim < along else dim + 1)]
    return [(x, dim)] if dim != along else _mixes(node)


def _moved(node: Node, dim: int) -> Rows | Reject:
    """Ops that only rename dimensions."""
    x: Any = G.args_of(node)[0] if node.args else None
    target, rank = node.target, _rank(node)
    if target is aten.unsqueeze.default:
        new = _positive(G.args_of(node)[1], rank)
        return [(x, dim if dim < new else dim - 1)] if dim != new else _mixes(node)
    if target is aten.squeeze.dim:
        gone = _positive(G.args_of(node)[1], _rank(x))
        return [(x, dim if dim < gone or _rank(x) == rank else dim + 1)]
    if target is aten.transpose.int:
        a, b = (_positive(d, rank) for d in G.args_of(node)[1:3])
        return [(x, {a: b, b: a}.get(dim, dim))]
    if target is aten.permute.default:
        return [(x, _positive(G.args_of(node)[1][dim], rank))]
    if target is aten.expand.default:
        at = dim - (rank - _rank(x))
        return [(x, at)] if at >= 0 and G.same_size(G.val(x).shape[at], G.val(node).shape[dim]) else _mixes(node)
    if target in _RESHAPES:
        return _reshaped(node, dim)
    return _mixes(node)


def _reshaped(node: Node, dim: int) -> Rows | Reject:
    """A reshape keeps rows apart if it keeps their dimension and as many elements before it."""
    x, old, new = G.args_of(node)[0], G.val(G.args_of(node)[0]).shape, G.val(node).shape
    for at in range(len(old)):
        if G.same_size(old[at], new[dim]) and G.same_size(_product(old[:at]), _product(new[:dim])):
            return [(x, at)]
    return _mixes(node)


def _product(sizes: Any) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total
