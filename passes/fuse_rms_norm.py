"""Compute a root-mean-square norm by one op.

Before:   wide = to(x, f32); mul(wide, rsqrt(add(mean(pow(wide, 2), -1), eps))); then the weight, in one of three spellings
After:    llmc.rms_norm(x, weight, eps, offset, round_first)
Applies:  over the last dimension; weight [n], rounded before it (Llama), after it (gpt-oss), or as 1 + weight (Gemma)
Why:      five to nine ops read as one; later passes find a norm by its name and join it with what stands before it
Order:    after the exact passes; before fuse-add-rms-norm and fuse-rope-kv-write, which look for llmc.rms_norm
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from llmc.kernels.ops import overload
from llmc.passes import graph as G
from llmc.passes.base import NodePass, Numerics, PassContext, Reject

aten = torch.ops.aten

CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default)


@dataclass(frozen=True)
class RmsNorm:
    """A norm as the graph spells it. result: the node that is replaced."""

    result: Node
    x: Node
    weight: Node
    eps: float
    offset: float
    round_first: bool


@dataclass(frozen=True)
class FuseRmsNorm(NodePass[RmsNorm]):
    name: ClassVar[str] = "fuse-rms-norm"
    numerics: ClassVar[Numerics] = Numerics.CLOSE  # the mean of the squares is summed in another order

    even_rows: bool = False  # leave norms over heads inside a wider tensor to what joins them with the rotation that follows

    def find(self, node: Node, ctx: PassContext) -> RmsNorm | Reject | None:
        return self.root(node)

    def root(self, node: Node) -> RmsNorm | Reject | None:
        """The norm whose reciprocal root a node is, why it stays, or None if the node is no such root."""
        quotient = _quotient(node) if G.is_op(node, aten.rsqrt.default) else None
        if quotient is None:
            return None
        product, wide, eps = quotient
        x, dtype = _behind_cast(wide), G.val(wide).dtype
        if dtype != torch.float32:
            return Reject("the squares are not summed in fp32", dtype)
        if self.even_rows and not G.even_rows(G.val(x)):
            return Reject("its rows are not evenly spaced", x.name)
        return _weighted(product, x, eps)

    def rewrite(self, gm: GraphModule, ctx: PassContext, match: RmsNorm) -> None:
        with gm.graph.inserting_before(match.result):
            arguments = (match.x, match.weight, match.eps, match.offset, match.round_first)
            new = G.call(gm, overload("rms_norm"), arguments)
        G.substitute(gm, match.result, new)


def norm_of(result: Node) -> RmsNorm | None:
    """The norm whose result this is, spelled in ops; None if it is none. The norm may have other readers inside or behind it."""
    for rsqrt in _roots(result):
        found = FuseRmsNorm().root(rsqrt)
        if isinstance(found, RmsNorm) and found.result is result:
            return found
    return None


def _roots(result: Node) -> list[Node]:
    """The reciprocal roots at most four calls above: behind a cast, the weight, another cast and the product."""
    found, level = [], [result]
    for _ in range(4):
        level = [n for below in level for n in below.all_input_nodes if n.op == "call_function"]
        found += [n for n in level if G.is_op(n, aten.rsqrt.default)]
    return found


def _quotient(rsqrt: Node) -> tuple[Node, Node, float] | None:
    """(x / rms(x), x in fp32, eps) of a reciprocal root, None if it is not of a mean of squares over the last dimension."""
    added = G.args_of(rsqrt)[0]
    if not G.is_op(added, aten.add.Tensor) or not isinstance(G.args_of(added)[1], float) or added.kwargs:
        return None
    mean, eps = G.args_of(added)
    if not G.is_op(mean, aten.mean.dim) or list(G.argument(mean, 1, "dim")) not in ([-1], [len(G.val(mean).shape) - 1]):
        return None
    if G.argument(mean, 2, "keepdim", False) is not True:
        return None
    wide = _squared(G.args_of(mean)[0])
    product = _only_user(rsqrt)
    if wide is None or product is None or not G.is_op(product, aten.mul.Tensor) or wide not in G.args_of(product):
        return None
    return product, wide, eps


def _squared(square: Any) -> Node | None:
    """x of pow(x, 2) or mul(x, x)."""
    if G.is_op(square, aten.pow.Tensor_Scalar) and G.args_of(square)[1] == 2:
        return _node(G.args_of(square)[0])
    if G.is_op(square, aten.mul.Tensor) and G.args_of(square)[0] is G.args_of(square)[1]:
        return _node(G.args_of(square)[0])
    return None


def _weighted(product: Any, x: Node, eps: float) -> RmsNorm | Reject:
    """The weight applied to x / rms(x), and the roundings around it."""
    rounded = _only_user(product)
    round_first = G.is_op(rounded, *CASTS) and G.val(rounded).dtype == G.val(x).dtype
    quotient = rounded if round_first else product
    scaled = _only_user(quotient)
    if scaled is None or not G.is_op(scaled, aten.mul.Tensor):
        return Reject("no weight follows, or something else reads the quotient", product.name)
    factor = next((a for a in G.args_of(scaled) if a is not quotient), None)
    offset, weight = _offset(factor)
    if weight is None or tuple(G.val(weight).shape) != (G.val(x).shape[-1],):
        return Reject("what it is multiplied with is not a weight per column", scaled.name)
    if G.val(scaled).dtype == G.val(x).dtype:
        return RmsNorm(scaled, x, weight, eps, offset, bool(round_first))
    result = _only_user(scaled)
    if round_first or not G.is_op(result, *CASTS) or G.val(result).dtype != G.val(x).dtype:
        return Reject("the result is not rounded to the input's dtype", scaled.name)
    assert result is not None
    return RmsNorm(result, x, weight, eps, offset, round_first=False)


def _offset(factor: Any) -> tuple[float, Node | None]:
    """(offset, weight) of `weight` or `offset + weight`, widened or not."""
    if G.is_op(factor, aten.add.Tensor) and isinstance(G.args_of(factor)[1], (int, float)) and not factor.kwargs:
        return float(G.args_of(factor)[1]), _widened(G.args_of(factor)[0])
    return 0.0, _widened(factor)


def _widened(value: Any) -> Node | None:
    node = _node(value)
    return None if node is None else _behind_cast(node)


def _behind_cast(node: Node) -> Node:
    """The value a cast to fp32 was made from, the node itself if it is none."""
    if G.is_op(node, *CASTS) and G.val(node).dtype == torch.float32:
        inner: Node = G.args_of(node)[0]
        return inner
    return node


def _only_user(node: Node | None) -> Node | None:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def _node(value: Any) -> Node | None:
    return value if isinstance(value, Node) else None
