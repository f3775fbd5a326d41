"""Normalise and rotate q and k and write the KV cache in one op.

Before:   q, k = rotations of (rms_norm of) q', k'; paged_attention(q, k, v, caches, ...)
After:    q = llmc.rope_kv_write(q', k', v, positions, cos, sin, norms, caches, ...); paged_attend(q, caches, ...)
Applies:  both rotated by the same tables, halves against halves, on all or the first dimensions of a head; norms over a head
Why:      k and v go from the linear's result into the cache; two norms, two rotations and a write are one launch per layer
Order:    after constant-fold-rope (it makes the tables) and fuse-rms-norm, which on CPUs leaves norms over heads as they are spelled
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from llmc.kernels.ops import overload
from llmc.passes import graph as G
from llmc.passes.base import NodePass, Numerics, PassContext, Reject
from llmc.passes.fuse_rms_norm import RmsNorm, norm_of
from llmc.passes.rotation import Rotation, rotation

aten = torch.ops.aten

_VIEWS = (aten.transpose.int, aten.squeeze.dim, aten.unsqueeze.default, aten.permute.default, aten.view.default, aten.reshape.default)


@dataclass(frozen=True)
class Operand:
    """q or k: `views` of a rotation of `inner` of a norm (or nothing) of `source`; views are replayed outermost last."""

    views: tuple[Node, ...]
    turned: Rotation
    inner: tuple[Node, ...]
    norm: RmsNorm | None

    @property
    def norm_settings(self) -> tuple[float, float, bool] | None:
        """eps, offset, round_first; None without a norm."""
        return None if self.norm is None else (self.norm.eps, self.norm.offset, self.norm.round_first)


@dataclass(frozen=True)
class RotatedAttention:
    """An attention and where its q and k come from."""

    attention: Node
    q: Operand
    k: Operand


@dataclass(frozen=True)
class FuseRopeKVWrite(NodePass[RotatedAttention]):
    name: ClassVar[str] = "fuse-rope-kv-write"
    numerics: ClassVar[Numerics] = Numerics.CLOSE  # rotates in fp32 and rounds once where the ops round three times

    def find(self, node: Node, ctx: PassContext) -> RotatedAttention | Reject | None:
        if not G.is_op(node, G.ATTENTION):
            return None
        q, k = _operand(G.args_of(node)[0]), _operand(G.args_of(node)[1])
        if isinstance(q, Reject):
            return q
        if isinstance(k, Reject):
            return k
        if _tables(q.turned) != _tables(k.turned):
            return Reject("q and k are rotated by different tables", node.name)
        widths = {G.val(G.args_of(node)[i]).shape[-1] for i in range(3)}
        if len(widths) > 1:
            return Reject("the heads of q, k and v differ in width", sorted(widths))
        if q.norm_settings != k.norm_settings:  # one norm alone, or two kinds: they stay in front of the op
            q, k = (Operand(o.views, o.turned, (), None) for o in (q, k))
        return RotatedAttention(node, q, k)

    def rewrite(self, gm: GraphModule, ctx: PassContext, match: RotatedAttention) -> None:
        attention, turned = match.attention, match.q.turned
        _, _, v, k_cache, v_cache, slots, tables, lengths, starts, layer, group, *rest = G.args_of(attention)
        eps, offset, round_first = match.q.norm_settings or (0.0, 0.0, False)
        with gm.graph.inserting_before(attention):
            q, k = _source(gm, match.q), _source(gm, match.k)
            cos, sin = (_table(gm, ctx, read, turned.half) for read in (turned.cos, turned.sin))
            norms = [None if o.norm is None else o.norm.weight for o in (match.q, match.k)]
            arguments = (q, k, v, turned.positions, cos, sin, *norms, eps, offset, round_first, k_cache, v_cache, slots, group)
            written = G.call(gm, overload("rope_kv_write"), arguments)
            attended = (written, k_cache, v_cache, tables, lengths, starts, layer, group, *rest)
            new = G.call(gm, overload("paged_attend"), attended)
        G.substitute(gm, attention, new)


def _operand(value: Node) -> Operand | Reject:
    views, result = _views(value)
    turned = rotation(result)
    if isinstance(turned, Reject):
        return turned
    if G.val(value).dtype != G.val(turned.x).dtype:
        return Reject("rotating changes the dtype", (G.val(turned.x).dtype, G.val(value).dtype))
    inner, source = _views(turned.x)
    return Operand(views, turned, inner, _norm(source))


def _norm(result: Node) -> RmsNorm | None:
    """The norm whose result this is, as one op or spelled in several."""
    if G.is_op(result, "llmc.rms_norm.default"):
        return RmsNorm(result, *G.args_of(result))
    return norm_of(result)


def _views(value: Node) -> tuple[tuple[Node, ...], Node]:
    """The views between a value and what it is made from that keep the last dimension whole, and that value."""
    found = []
    while G.is_op(value, *_VIEWS) and _keeps_last(value):
        found.append(value)
        value = G.args_of(value)[0]
    return tuple(found), value


def _keeps_last(view: Node) -> bool:
    """Whether a view leaves the last dimension where it is: equal in size, and at stride 1 before and after."""
    before, after = G.val(G.args_of(view)[0]), G.val(view)
    if not G.same_size(before.shape[-1], after.shape[-1]):
        return False
    if G.is_op(view, aten.transpose.int):
        rank = len(after.shape)
        return all(d % rank != rank - 1 for d in G.args_of(view)[1:3])
    if G.is_op(view, aten.permute.default):
        return bool(G.args_of(view)[1][-1] % len(after.shape) == len(after.shape) - 1)
    if G.is_op(view, aten.squeeze.dim, aten.unsqueeze.default):
        rank = max(len(before.shape), len(after.shape))
        return bool(G.args_of(view)[1] % rank != rank - 1)
    return True  # a reshape that keeps the last size cuts the elements into the same rows


def _source(gm: GraphModule, operand: Operand) -> Node:
    """q or k before norm and rotation, in the shape attention wants it: the views done again on what they now skip to."""
    source: Node = operand.turned.x if operand.norm is None else operand.norm.x
    replayed: Sequence[Node] = operand.views if operand.norm is None else (*operand.views, *operand.inner)
    for view in reversed(replayed):
        source = G.call(gm, view.target, (source, *view.args[1:]), dict(view.kwargs))  # type: ignore[arg-type]
    return source


def _tables(turned: Rotation) -> tuple[str, str, Node, bool]:
    return str(turned.cos.target), str(turned.sin.target), turned.positions, turned.half


def _table(gm: GraphModule, ctx: PassContext, read: Node, half: bool) -> Node:
    """A rotary table of full width; one of half the width is written twice side by side."""
    name = str(read.target)
    if half:
        doubled = f"{name}_twice"
        value = ctx.weights[name].value
        assert value is not None, "constant-fold-rope computes its tables"
        name = doubled if doubled in ctx.weights else ctx.weights.add_computed(doubled, torch.cat([value, value], dim=1))
    return G.constant(gm, ctx.weights, name)
