"""Recognising a rotary embedding in a graph: which value is turned, and by which tables."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from llmc.passes import graph as G
from llmc.passes.base import Reject

aten = torch.ops.aten

END = 1 << 62  # a slice that ends here or later goes to the end
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default)


@dataclass(frozen=True)
class Rotation:
    """x [.., T, D] whose first dimensions are turned. cos, sin: constants [P, R], or [P, R/2] if `half`, read at `positions` [T]."""

    x: Node
    cos: Node
    sin: Node
    positions: Node
    half: bool


def rotation(result: Node) -> Rotation | Reject:
    """What a value is a rotation of.

    Spellings: x * cos + rotate_half(x) * sin, on all or on the first dimensions of x; and cat of (a*cos - b*sin, b*cos + a*sin) for
    the halves a, b of x, whose tables have half the width.
    """
    result = _behind_cast(result)
    if not G.is_op(result, aten.cat.default):
        return _sum_of_products(result)
    parts = G.args_of(result)[0]
    if G.argument(result, 1, "dim", 0) not in (-1, len(G.val(result).shape) - 1) or len(parts) != 2:
        return Reject("it is not rotated")
    if G.is_op(parts[0], aten.sub.Tensor):
        return _of_halves(*parts)
    return _partial(*parts)


def _partial(turned: Node, rest: Node) -> Rotation | Reject:
    """cat(rotation of x[:R], x[R:])."""
    found = _sum_of_products(_behind_cast(turned))
    if isinstance(found, Reject):
        return found
    width = G.val(turned).shape[-1]
    whole, begin, end = _slice(rest)
    first, zero, stop = _slice(found.x)
    if found.x is whole and width == G.val(whole).shape[-1] and begin == width:
        return found  # x[:R] is x itself, and the rest is empty
    if whole is None or first is not whole or (zero, stop, begin) != (0, width, width) or end < END:
        return Reject("what is not rotated is not the end of a head", rest.name)
    return Rotation(whole, found.cos, found.sin, found.positions, half=False)


def _sum_of_products(result: Any) -> Rotation | Reject:
    """x * cos + rotate_half(x) * sin."""
    if not G.is_op(result, aten.add.Tensor) or result.kwargs or not all(G.is_op(a, aten.mul.Tensor) for a in G.args_of(result)):
        return Reject("it is not rotated")
    plain, crossed = G.args_of(result)
    x, cos = G.args_of(plain)
    turned, sin = G.args_of(crossed)
    if G.is_op(turned, aten.flatten.using_ints):
        return Reject("neighbouring dimensions are rotated with each other", result.name)
    if not _turned_halves(turned, x):
        return Reject("it is not rotated")
    return _with_tables(x, cos, sin, half=False)


def _turned_halves(turned: Any, x: Any) -> bool:
    """Whether `turned` is cat(-x[R/2:], x[:R/2])."""
    if not G.is_op(turned, aten.cat.default) or G.argument(turned, 1, "dim", 0) not in (-1, len(G.val(turned).shape) - 1):
        return False
    parts = G.args_of(turned)[0]
    if len(parts) != 2 or not G.is_op(parts[0], aten.neg.default):
        return False
    middle = G.val(x).shape[-1] // 2
    (of_high, begin, end), (of_low, zero, stop) = _slice(G.args_of(parts[0])[0]), _slice(parts[1])
    return of_high is x and of_low is x and (begin, zero, stop) == (middle, 0, middle) and end >= 2 * middle


def _of_halves(low: Node, high: Node) -> Rotation | Reject:
    """cat(a*cos - b*sin, b*cos + a*sin) of a, b = chunk(x, 2)."""
    products = [*G.args_of(low), *G.args_of(high)]
    if not G.is_op(high, aten.add.Tensor) or low.kwargs or high.kwargs or not all(G.is_op(p, aten.mul.Tensor) for p in products):
        return Reject("it is not rotated")
    (a, cos), (b, sin), (b_again, cos_again), (a_again, sin_again) = (G.args_of(p) for p in products)
    if (a, b, cos, sin) != (a_again, b_again, cos_again, sin_again):
        return Reject("it is not rotated")
    (x, first), (x_again, second) = _half(a), _half(b)
    if x is None or x is not x_again or (first, second) != (0, 1):
        return Reject("it is not rotated")
    return _with_tables(x, cos, sin, half=True)


def _half(part: Any) -> tuple[Node | None, int]:
    """(x, i) of chunk(x, 2, -1)[i]."""
    if getattr(part, "target", None) is not operator.getitem or not G.is_op(G.args_of(part)[0], aten.chunk.default):
        return None, 0
    chunk, index = G.args_of(part)
    x = G.args_of(chunk)[0]
    last = G.argument(chunk, 2, "dim", 0) in (-1, len(G.val(x).shape) - 1)
    return (x if last and G.args_of(chunk)[1] == 2 else None), index


def _with_tables(x: Any, cos: Any, sin: Any, *, half: bool) -> Rotation | Reject:
    found = [_table(value, x) for value in (cos, sin)]
    tables = [t for t in found if t is not None]
    if len(tables) < 2:
        return Reject("cos and sin are not looked up by position", getattr(x, "name", None))
    (cos_table, positions), (sin_table, other) = tables
    if positions is not other:
        return Reject("cos and sin are read at different positions", x.name)
    return Rotation(x, cos_table, sin_table, positions, half)


def _table(value: Any, x: Node) -> tuple[Node, Node] | None:
    """(constant, positions) of a row of a table per token, shaped to be broadcast over the heads of `x`."""
    shape = G.val(value).shape
    while G.is_op(value, aten.unsqueeze.default):
        value = G.args_of(value)[0]
    if not G.is_op(value, aten.index_select.default) or G.args_of(value)[1] != 0 or not G.is_constant(G.args_of(value)[0]):
        return None
    tokens = [i for i, size in enumerate(shape[:-1]) if G.size_expr(size) != 1]
    # one dimension besides the last, and it must meet x's tokens, not its heads
    if len(tokens) != 1 or len(G.val(x).shape) < len(shape):
        return None
    at = tokens[0] - len(shape)
    if not G.same_size(G.val(x).shape[at], shape[tokens[0]]):
        return None
    table, _, positions = G.args_of(value)
    return table, positions


def _slice(value: Any) -> tuple[Node | None, int, int]:
    """(x, begin, end) of x[..., begin:end] along the last dimension; (None, 0, 0) if it is no such slice."""
    if not G.is_op(value, aten.slice.Tensor) or G.argument(value, 4, "step", 1) != 1:
        return None, 0, 0
    x = G.args_of(value)[0]
    if G.argument(value, 1, "dim", 0) not in (-1, len(G.val(x).shape) - 1):
        return None, 0, 0
    begin, end = G.argument(value, 2, "start") or 0, G.argument(value, 3, "end")
    return x, begin, END if end is None else end


def _behind_cast(node: Node) -> Node:
    if G.is_op(node, *_CASTS):
        inner: Node = G.args_of(node)[0]
        return inner
    return node
